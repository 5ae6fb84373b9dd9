"""Copy the page's libraries, at the versions named here, from npm into the package: `python web/vendor.py`.

They are kept in the repository, so nothing else needs npm. `--check` compares instead of writing. axe-core, which only
the browser tests use, goes to `tests/browser/axe`.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = Path("src/loraretriever/server/static/vendor")


@dataclass(frozen=True)
class Package:
    """A package on npm: which of its files go where below the repository, and the SHA-512 of its archive."""

    name: str
    version: str
    sha512: str
    files: dict[str, Path]
    # Browsers resolve paths only, so imports by name become paths; a script without exports gets one.
    replace: dict[str, str] = field(default_factory=dict)
    append: dict[str, str] = field(default_factory=dict)


PACKAGES = (
    Package(
        "preact",
        "11.2.0",
        "/HfHI/7N84e6GrWBJ3J280z3mLaRJiDcSvj/A+y/4AbLnND/1UlGHe1sR6oYuTGwId0nP7dqDU9OnLxMPZ7xBg==",
        {
            "dist/preact.mjs": PAGE / "preact.js",
            "hooks/dist/hooks.mjs": PAGE / "preact-hooks.js",
            "LICENSE": PAGE / "preact.LICENSE.txt",
        },
        replace={'from"preact"': 'from"./preact.js"'},
    ),
    Package(
        "htm",
        "3.1.1",
        "983Vyg8NwUE7JkZ6NmOqpCZ+sh1bKv2iYTlUkzlWmA5JD2acKoxd4KVxbMmxX/85mtfdnDmTFoNKcg5DGAvxNQ==",
        {"dist/htm.mjs": PAGE / "htm.js", "LICENSE": PAGE / "htm.LICENSE.txt"},
    ),
    Package(
        "uplot",
        "1.6.32",
        "KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw==",
        {
            "dist/uPlot.iife.min.js": PAGE / "uplot.js",
            "dist/uPlot.min.css": PAGE / "uplot.css",
            "LICENSE": PAGE / "uplot.LICENSE.txt",
        },
        append={"dist/uPlot.iife.min.js": "export default uPlot;\n"},
    ),
    Package(
        "axe-core",
        "4.14.1",
        "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ==",
        {"axe.min.js": Path("tests/browser/axe/axe.min.js"), "LICENSE": Path("tests/browser/axe/LICENSE")},
    ),
)


def archive(package: Package, folder: Path) -> Path:
    """Download the package's archive into the folder."""
    command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    name = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
    path = folder / name
    found = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != package.sha512:
        raise SystemExit(f"{name} has the SHA-512 {found}; expected {package.sha512}.")
    return path


def contents(package: Package, path: Path) -> dict[Path, bytes]:
    """What the package's files become, by their place in the repository."""
    made = {}
    with tarfile.open(path) as tar:
        for source, target in package.files.items():
            file = tar.extractfile(f"package/{source}")
            assert file is not None
            data = file.read()
            if target.suffix == ".js":
                text = data.decode()
                for old, new in package.replace.items():
                    text = text.replace(old, new)
                lines = [line for line in text.splitlines() if not line.startswith("//# sourceMappingURL=")]
                data = ("\n".join(lines) + "\n" + package.append.get(source, "")).encode()
            made[target] = data
    return made


def main() -> None:
    """Write or check the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    differing = []
    for package in PACKAGES:
        with tempfile.TemporaryDirectory() as folder:
            made = contents(package, archive(package, Path(folder)))
        for target, data in made.items():
            path = ROOT / target
            if check and (not path.is_file() or path.read_bytes() != data):
                differing.append(str(target))
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
    if differing:
        sys.exit(f"not as in their packages: {', '.join(differing)}; run python web/vendor.py")


if __name__ == "__main__":
    main()
