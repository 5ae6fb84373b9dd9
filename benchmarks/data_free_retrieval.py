"""Can adapters be found without samples? Scores from weights alone, against names, descriptions and samples.

    python benchmarks/data_free_retrieval.py --tasks shared/tasks/validation

With x the input of a targeted module, s B A = U S V' an adapter's update, v its first right singular vector:

- arrow: |v'x|; spectr: |S V'x| = |s B A x|; mass: |V'x|² / |x|². Averaged over modules and tokens: all, own (after the
  chat template's common beginning) or last (spectr: LoGo's norm). Centred: x less its mean over neutral prompts.
  Drift: V of A less the pool's mean A, which takes out an initialisation that all adapters share.
- entropy: the less entropy the next token has with the adapter, the better (LoGo).
- name, description, samples: the sentence encoder's cosine (samples: with their mean, as the project does).

Results are per cent of prompts whose adapter is among the first k: by raw scores; standardised by each adapter's mean
and deviation over neutral prompts; so by module, before averaging. Cost is processor time; but for the encoder, of the
base model's forward pass with the method in it. Adapters must agree in targets and rank.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from common import SEED, Output, alternate
from loraretriever.models import BaseModel, load_base_model, render_prompt
from loraretriever.pool import Pool
from loraretriever.retrieve import SentenceEncoder
from loraretriever.types import AdapterWeights

NEUTRAL = """Tell me a joke.|What should I cook?|How do I learn to swim?|Write a poem about autumn.|Who was Ada
Lovelace?|Plan a weekend in Lisbon.|What is the tallest mountain?|How does a bicycle stay upright?|Why is the sky
blue?|Name my cat.|How can I sleep better?|Describe a quiet forest at dawn.|What is inflation?|How do vaccines
work?|Write a letter to my landlord about a broken heater.|What is jazz?|List the instruments of an orchestra.|How do I
tie a tie?|What are the rules of chess?|Help me prepare for a job interview.|How are pearls made?|What makes bread
rise?|How often should I water a cactus?|Write a story about a lighthouse keeper.|Which planets have rings?|What causes
tides?|What is a black hole?|Compare tea and coffee.|Invent a new holiday.|How do I remove a wine stain?|Tell me about
octopuses.|Recommend a hobby for rainy days.|Write a toast for my sister's wedding.|What does a good warm-up look
like?|Tell a riddle.|Why do leaves change colour?|Describe the taste of a ripe mango to someone who has never had
one.|How do I start a garden?|What should I pack for a week of hiking?|How do I keep a conversation going?|Who painted
the Mona Lisa?|What is rust?|How do I fold a paper plane that flies far?|What is daydreaming good for?|Tell me about
Rome.|Give me ideas for a party.|How do I sharpen a knife?|Explain photosynthesis to a child.|Draft a note about loud
music.|How do frogs differ from toads?""".replace("\n", " ").split("|")

Look = Callable[[str, torch.Tensor], object]

# Shape: x (tokens, in), v (adapters, rank, in), s (adapters, rank) -> (tokens, adapters).
SCORES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "arrow": lambda x, v, s: (x @ v[:, 0].T).abs(),
    "spectr": lambda x, v, s: ((x @ v.flatten(0, 1).T).unflatten(1, s.shape) * s).norm(dim=2),
    "mass": lambda x, v, s: (x @ v.flatten(0, 1).T).unflatten(1, s.shape).square().sum(2) / x.square().sum(1)[:, None],
}


def spectrum(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """V' and S of B A. Shape: a (n, rank, in), b (n, out, rank) -> (n, rank, in), (n, rank)."""
    q, r = torch.linalg.qr(a.mT)
    _, s, w = torch.linalg.svd(torch.linalg.qr(b)[1] @ r.mT)
    return w @ q.mT, s


class WeightScores:
    """Scores of all adapters from one forward pass of the base model, reduced while it runs."""

    def __init__(self, base: BaseModel, adapters: Sequence[AdapterWeights]) -> None:
        self._base = base
        self._modules = {path: base.model.get_submodule(path) for path in adapters[0].modules}
        self.spectra: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] = {}
        for path in self._modules:
            pairs = [adapter.modules[path] for adapter in adapters]
            a = torch.stack([pair.a.float() for pair in pairs])
            self.spectra["", path] = spectrum(a, torch.stack([pair.scaling * pair.b.float() for pair in pairs]))
            self.spectra[" drift", path] = spectrum(a - a.mean(0), torch.eye(a.shape[1]).expand(len(a), -1, -1))
        tokens = zip(self._tokens("A")[0], self._tokens("Zebra")[0], strict=False)
        self._start = [one == other for one, other in tokens].index(False)
        inputs = defaultdict(list)
        for prompt in NEUTRAL:
            self.forward(prompt, lambda path, x: inputs[path].append(x[self._start :].mean(0)))
        self._means = {path: torch.stack(of).mean(0) for path, of in inputs.items()}

    def _tokens(self, prompt: str) -> torch.Tensor:
        text = render_prompt(self._base.tokenizer, prompt)
        return self._base.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids

    @torch.inference_mode()
    def forward(self, prompt: str, look: Look | None = None) -> torch.Tensor:
        """Logits of the next token. `look` is shown each module's path and input, shape (tokens, in)."""

        def show(path: str, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            look(path, inputs[0][0]) if look else None

        hooks = [m.register_forward_pre_hook(partial(show, path)) for path, m in self._modules.items() if look]
        output = self._base.model(self._tokens(prompt), use_cache=False, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        return output.logits[0, -1]

    def all(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Scores by method. Shape: (prompts, modules, adapters)."""
        found = defaultdict(list)

        def look(path: str, x: torch.Tensor) -> None:
            for (name, score), drift, centred in product(SCORES.items(), ("", " drift"), ("", " centred")):
                values = score(x - self._means[path] if centred else x, *self.spectra[drift, path])
                for tokens, start in {"all": 0, "own": self._start, "last": -1}.items():
                    found[f"{name}{drift}{centred}, tokens: {tokens}"].append(values[start:].mean(0))

        for prompt in prompts:
            self.forward(prompt, look)
        return {name: torch.stack(values).unflatten(0, (len(prompts), -1)) for name, values in found.items()}

    def entropy(self, adapters: Sequence[AdapterWeights], prompts: Sequence[str]) -> torch.Tensor:
        """Minus the entropy of the next token with each adapter. Shape: (prompts, 1, adapters)."""
        kept, columns = {path: module.weight.data for path, module in self._modules.items()}, []
        for adapter in adapters:
            for path, pair in adapter.modules.items():
                self._modules[path].weight.data = kept[path] + pair.scaling * (pair.b.float() @ pair.a.float())
            logs = torch.stack([self.forward(prompt).log_softmax(0) for prompt in prompts])
            columns.append((logs.exp() * logs).sum(1))
        for path, weight in kept.items():
            self._modules[path].weight.data = weight
        return torch.stack(columns, 1)[:, None]


def standardised(scores: torch.Tensor, neutral: torch.Tensor) -> torch.Tensor:
    """By mean and deviation over neutral prompts; where these do not differ (first layer, last token), about 0."""
    return (scores - neutral.mean(0)) / torch.maximum(neutral.std(0), 1e-3 * neutral.mean(0).abs())


def percents(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Of prompts; ties and NaN count as ahead. Shape: scores (prompts, adapters), labels (prompts,)."""
    ranks = (~(scores < scores.gather(1, labels[:, None]))).sum(1)
    return {f"top{k}": round(100 * (ranks <= k).float().mean().item(), 1) for k in (1, 3, 5)}


def accuracies(scores: torch.Tensor, neutral: torch.Tensor, labels: torch.Tensor) -> dict[str, dict[str, float]]:
    """By kind of standardisation. Shape: scores, neutral (prompts, modules, adapters)."""
    kinds = {"raw": scores.mean(1), "standardised": standardised(scores.mean(1), neutral.mean(1))}
    kinds["by module"] = standardised(scores, neutral).mean(1)
    return {kind: percents(of, labels) for kind, of in kinds.items()}


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, default=Path("demo/pool"))
    parser.add_argument("--tasks", type=Path, required=True, help="folder of <adapter>.jsonl with prompts in `inputs`")
    parser.add_argument("--per-task", type=int, default=10)
    parser.add_argument("--entropy", action="store_true", help="measure it too; one prompt per task, 10 neutral ones")
    args = parser.parse_args()
    torch.set_num_threads(1)
    output, rng, pool = Output(None), random.Random(SEED), Pool.open(args.pool)
    known, adapters = pool.list(), [pool.weights(adapter.name) for adapter in pool.list()]
    lines = [(args.tasks / f"{adapter.name}.jsonl").read_text("utf-8").splitlines() for adapter in known]
    prompts = [json.loads(line)["inputs"] for of_task in lines for line in rng.sample(of_task, args.per_task)]
    labels = torch.arange(len(known)).repeat_interleave(args.per_task)

    def report(method: str, results: object) -> None:
        setup = {"tasks": args.tasks.name, "per_task": args.per_task}
        output.write({"benchmark": "data-free", "method": method, "setup": setup, "results": results})

    report("chance", {"raw": {f"top{k}": round(100 * k / len(known), 1) for k in (1, 3, 5)}})
    encoder = SentenceEncoder(instruction="")
    texts = {"samples (reference)": [[sample.text for sample in pool.samples(a.name)] for a in known]}
    texts |= {"name": [[a.name.replace("_", " ")] for a in known], "description": [[a.description] for a in known]}
    asked, generic = (torch.from_numpy(encoder.encode(of))[:, None] for of in (prompts, NEUTRAL))
    for method, of_adapters in texts.items():
        means = torch.stack([torch.from_numpy(encoder.encode(of)).mean(0) for of in of_adapters])
        unit = (means / means.norm(dim=1, keepdim=True)).T
        report(method, accuracies(asked @ unit, generic @ unit, labels))
    scorer = WeightScores(load_base_model(pool.base_model, "float32"), adapters)
    neutral, found = scorer.all(NEUTRAL), scorer.all(prompts)
    for method, scores in found.items():
        report(method, accuracies(scores, neutral[method], labels))
    logo = standardised(*(of["spectr, tokens: last"].mean(1) for of in (found, neutral)))
    both: Any = sum((of - of.mean(1, keepdim=True)) / of.std(1, keepdim=True) for of in (logo, (asked @ unit)[:, 0]))
    report("description + spectr, tokens: last", {"standardised": percents(both, labels)})
    timed = rng.sample(prompts, 8)
    looks = {name: lambda path, x, of=of: of(x, *scorer.spectra["", path]) for name, of in SCORES.items()}
    looks["spectr, tokens: last"] = lambda path, x: looks["spectr"](path, x[-1:])
    calls = {name: lambda look=look: [scorer.forward(prompt, look) for prompt in timed] for name, look in looks.items()}
    calls["base"] = lambda: [scorer.forward(prompt) for prompt in timed]
    calls["encoder"] = lambda: [encoder.encode([prompt]) for prompt in timed]
    ms = {name: 1e3 * min(of) / len(timed) for name, of in alternate(calls, 5, "cpu", 1).items()}
    report("cost", {name: {"ms": round(of, 1), "relative": round(of / ms["base"], 2)} for name, of in ms.items()})
    if args.entropy:
        of_prompts, of_neutral = (scorer.entropy(adapters, of) for of in (prompts[:: args.per_task], NEUTRAL[:10]))
        report("entropy, one prompt per task", accuracies(of_prompts, of_neutral, labels[:: args.per_task]))


if __name__ == "__main__":
    main()
