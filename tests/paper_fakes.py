"""Stand-ins for what the preset `paper48` needs: a tiny random Llama, 48 random adapters, invented prompts.

The adapters have the names and the shape of the paper's (rank 6, alpha 12, q_proj and v_proj); their answers mean
nothing. Nothing here needs a network, and only the model needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from loraretriever.evaluate.experiment.paper48 import BASE_MODELS, TEMPLATE
from loraretriever.evaluate.experiment.paper48_tables import TASKS

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY, CONTEXT = 2, 64, 128, 4, 4, 640, 8192
RANK, ALPHA, TARGETS = 6, 12, ("q_proj", "v_proj")
_SPECIAL = ("<unk>", "<s>", "</s>")


def write_fake_base(folder: Path, texts: Iterable[str] = (), seed: int = 0, context: int = CONTEXT) -> Path:
    """A random two-layer Llama with a byte-level tokenizer learnt from the texts and the template; no chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = fake_tokenizer(texts)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fake_tokenizer(texts: Iterable[str] = ()) -> Any:
    """All bytes, and pairs that are frequent in the texts; like Llama's, it puts a token before each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEMPLATE, *texts], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def write_fake_adapters(
    folder: Path,
    tasks: Iterable[str] = TASKS,
    prefix: str = "llama2_7b_lora-",
    base_model: str = BASE_MODELS["7b"],
    size: float = 0.5,
) -> Path:
    """A folder with one PEFT folder per task, as the authors' are on the hub; `size`: the deviation of the factors."""
    for number, task in enumerate(tasks):
        rng = np.random.default_rng(number)
        tensors = {}
        for layer in range(LAYERS):
            for target in TARGETS:
                stem = f"base_model.model.model.layers.{layer}.self_attn.{target}.lora_"
                out = HIDDEN if target == "q_proj" else HIDDEN * KV_HEADS // HEADS
                tensors[f"{stem}A.weight"] = rng.normal(0, size, (RANK, HIDDEN)).astype("float32")
                tensors[f"{stem}B.weight"] = rng.normal(0, size, (out, RANK)).astype("float32")
        place = folder / f"{prefix}{task}"
        place.mkdir(parents=True, exist_ok=True)
        save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
        (place / "adapter_config.json").write_text(json.dumps(_config(base_model), indent=1) + "\n")
    return folder


def _config(base_model: str) -> dict[str, Any]:
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": RANK,
        "revision": None,
        "target_modules": list(TARGETS),
        "task_type": "CAUSAL_LM",
    }


def fake_rows(tasks: Iterable[str], count: int, kind: str) -> list[dict[str, str]]:
    """Invented prompts: `count` of each task, with all fields of both files."""
    return [
        {
            "adapter": task,
            "inputs": f"{kind} {number}: solve the {task.replace('_', ' ')} exercise in the {TASKS[task].domain} book.",
            "targets": f"answer {number % 3}",
            "task": task,
            "domain": TASKS[task].domain,
            "metric": TASKS[task].metric,
        }
        for task in tasks
        for number in range(count)
    ]


def write_fake_paper(folder: Path, tasks: Sequence[str] = tuple(TASKS), samples: int = 4, prompts: int = 2) -> Path:
    """A folder with `samples.jsonl` and `test.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, fields, rows in (
        ("samples.jsonl", ("adapter", "domain", "inputs", "targets"), fake_rows(tasks, samples, "sample")),
        ("test.jsonl", ("inputs", "targets", "task", "domain", "metric"), fake_rows(tasks, prompts, "test")),
    ):
        lines = [json.dumps({field: row[field] for field in fields}) + "\n" for row in rows]
        (folder / name).write_text("".join(lines))
    return folder


def write_fake_repository(
    folder: Path, tasks: Sequence[str] = tuple(TASKS), samples: int = 4, prompts: int = 2, suffix: str = ""
) -> Path:
    """The same prompts in the two files of the authors' repository; `suffix` follows the tasks' names."""
    for name in ("config", "dataset"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = fake_rows(tasks, samples, "sample")
    config = [
        {
            "model_name": task + suffix,
            "sample": [{"inputs": r["inputs"], "targets": r["targets"]} for r in rows if r["task"] == task],
            "domain": TASKS[task].domain,
        }
        for task in tasks
    ]
    test = [
        {key: row[key] for key in ("inputs", "targets", "task", "domain", "metric")} | {"task": row["task"] + suffix}
        for row in fake_rows(tasks, prompts, "test")
    ]
    (folder / "config" / "config2.json").write_text(json.dumps(config, indent=4))
    (folder / "dataset" / "combined_test.json").write_text(json.dumps(test, indent=4))
    return folder
