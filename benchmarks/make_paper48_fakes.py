"""Writes stand-ins for the models of the preset `paper48`, so that it can be tried where the real ones are not.

    python benchmarks/make_paper48_fakes.py FOLDER [--prompts PAPER]

`FOLDER/base` becomes a tiny random Llama, `FOLDER/adapters` 48 random adapters with the paper's names and shape, and,
without `--prompts`, `FOLDER/paper` invented prompts. Answers and scores mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from loraretriever.evaluate.experiment.paper48 import load_paper48

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # where the tests have the same need

from paper_fakes import write_fake_adapters, write_fake_base, write_fake_paper


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=Path, help="a folder with the paper's prompts")
    parser.add_argument("--size", choices=("7b", "13b"), default="7b", help="whose names the adapters get")
    options = parser.parse_args()
    paper = options.prompts or write_fake_paper(options.folder / "paper")
    preset = load_paper48(paper, options.size)
    texts = [each.inputs for rows in preset.samples.values() for each in rows]
    base = write_fake_base(options.folder / "base", texts)
    prefix = preset.adapters.rpartition("/")[2]
    adapters = write_fake_adapters(options.folder / "adapters", preset.samples, prefix, preset.base_model)
    print(
        f"loraretriever evaluate --preset paper48 --paper {paper} --base-model {base} --adapters {adapters} "
        "--prompts-per-task 1"
    )


if __name__ == "__main__":
    main()
