from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraretriever.errors import AdmissionError
from loraretriever.pool.admission import MAX_RANK, admit, same_base
from tiny import TINY_BASE, TINY_SPEC, lora_tensors, write_peft_folder

Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(AdmissionError) as caught:
        admit(folder, TINY_BASE, TINY_SPEC, **options)
    return str(caught.value)


def test_a_plain_lora_is_admitted(tmp_path: Path) -> None:
    admission = admit(write_peft_folder(tmp_path / "a", rank=4, targets=["v_proj", "q_proj"]), TINY_BASE, TINY_SPEC)
    assert admission.ranks == (4,)
    assert admission.targets == ("q_proj", "v_proj")
    assert admission.size == (tmp_path / "a/adapter_model.safetensors").stat().st_size
    assert admission.checked_shapes


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file

    write_peft_folder(tmp_path)
    tensors = {key: torch.tensor(value).to(getattr(torch, dtype)) for key, value in lora_tensors().items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert admit(tmp_path, TINY_BASE, TINY_SPEC).ranks == (4,)
    for bad in (math.nan, math.inf, -math.inf):
        tensors[B][1, 2] = bad
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        assert "NaN or infinite" in refusal(tmp_path)


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    ({"peft_type": None}, "peft_type is None"),
    ({"use_dora": True}, "use_dora=True"),
    ({"bias": "all"}, "bias is 'all'"),
    ({"bias": "lora_only"}, "bias is 'lora_only'"),
    ({"lora_bias": True}, "lora_bias=True"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens=[1, 2]"),
    ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
    ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
    ({"trainable_token_indices": [7]}, "trainable_token_indices=[7]"),
    ({"use_qalora": True}, "use_qalora=True"),
    ({"arrow_config": {"top_k": 3}}, "arrow_config"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    ({"kasa_config": {"beta": 1}}, "kasa_config"),
    ({"monteclora_config": {"buffer_size": 1}}, "monteclora_config"),
    ({"megatron_config": {"a": 1}}, "megatron_config"),
    ({"ensure_weight_tying": True}, "ensure_weight_tying=True"),
    ({"an_option_of_tomorrow": 1}, "an_option_of_tomorrow=1"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
    ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    ({"init_lora_weights": ["pissa"]}, "init_lora_weights is ['pissa']"),
    ({"r": 0}, "r is 0"),
    ({"r": "8"}, "r is '8'"),
    ({"r": True}, "r is True"),
    ({"lora_alpha": math.nan}, "lora_alpha is nan"),
    ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    ({"rank_pattern": [1]}, "rank_pattern is [1]"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] is 0"),
    ({"alpha_pattern": {"(": 1}}, "no regular expression"),
    ({"alpha_pattern": {"(a+)+": 1}}, "at most one group of alternatives, not repeated"),
    ({"alpha_pattern": {".*a.*b.*c": 1}}, "at most 2 repetitions"),
    ({"alpha_pattern": {"a?" * 30 + "a" * 30: 1}}, "expected the name of a module"),
    ({"alpha_pattern": {"(a|a)" * 30: 1}}, "expected the name of a module"),
    ({"alpha_pattern": {"a" * 257: 1}}, "at most 256 characters"),
    ({"alpha_pattern": {"[z-a]": 1}}, "no regular expression"),
    ({"rank_pattern": {"(?i)q_proj": 4}}, "expected the name of a module"),
    ({"rank_pattern": {"a{99999999999999}": 4}}, "expected the name of a module"),
    ({"rank_pattern": {"(" * 3000 + ")" * 3000: 4}}, "expected the name of a module"),
    ({"lora_alpha": 10**400}, "expected a finite number"),
    ({"alpha_pattern": {"q_proj": 10**400}}, "expected a finite number"),
    ({"r": 10**400}, "expected rank 1000"),
    ({"base_model_name_or_path": "a\ud800"}, "expected the name of a model"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3"),
    ({"base_model_name_or_path": "other/model"}, "--allow-base-mismatch"),
    ({"base_model_name_or_path": None}, "base_model_name_or_path is ''"),
    ({"r": 8}, "expected rank 8"),
    ({"rank_pattern": {"v_proj": 2}}, "expected rank 2"),
]


@pytest.mark.parametrize(("config", "message"), UNSUPPORTED, ids=range(len(UNSUPPORTED)))
def test_configurations_that_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    assert message in refusal(write_peft_folder(tmp_path, config=config))


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "layers.0.self_attn.q_proj",
        ".*\\.0\\..*q_proj",
        "model\\.layers\\.\\d+\\.mlp.*",
        "^model.layers.[0-9]+.self_attn.(q_proj|v_proj)$",
        "q_proj|v_proj",
    ],
)
def test_usual_patterns_are_admitted(tmp_path: Path, pattern: str) -> None:
    admit(write_peft_folder(tmp_path, config={"rank_pattern": {pattern: 4}}), TINY_BASE, TINY_SPEC)


@pytest.mark.parametrize("patterns", [{f"{'.' * n}.*.*b": 4 for n in range(100)}, {f"q{n}": 4 for n in range(20_000)}])
def test_patterns_that_would_take_long_are_refused(tmp_path: Path, patterns: dict[str, int]) -> None:
    tensors = {}
    for number in range(5000):
        name = f"{number}{'.' * 100}"
        for factor in "AB":
            tensors[f"base_model.model.{name}.lora_{factor}.weight"] = np.ones((1, 1), np.float32)
    write_peft_folder(tmp_path, tensors=tensors, config={"rank_pattern": patterns})
    begin = time.process_time()
    with pytest.raises(AdmissionError, match="take too long"):
        admit(tmp_path, TINY_BASE, None)
    assert time.process_time() - begin < 5


def test_module_names_are_short(tmp_path: Path) -> None:
    name = f"base_model.model.{'.' * 129}.lora_{{}}.weight"
    tensors = {name.format(factor): np.ones((1, 1), np.float32) for factor in "AB"}
    assert "expected only names like" in refusal(write_peft_folder(tmp_path, tensors=tensors))


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_model_alone_are_admitted(tmp_path: Path, start: Any) -> None:
    admit(write_peft_folder(tmp_path, config={"init_lora_weights": start}), TINY_BASE, TINY_SPEC)


def test_every_option_of_peft_at_its_default_is_admitted(tmp_path: Path) -> None:
    from peft import LoraConfig

    LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]).save_pretrained(str(tmp_path / "c"))
    config = json.loads((tmp_path / "c/adapter_config.json").read_text()) | {"base_model_name_or_path": TINY_BASE}
    admit(write_peft_folder(tmp_path / "a", config=config), TINY_BASE, TINY_SPEC)


Tensors = dict[str, np.ndarray]
BAD_TENSORS: list[tuple[Callable[[Tensors], object], str]] = [
    (lambda t: t.pop(B), "has lora_A only"),
    (lambda t: t.pop(A), "has lora_B only"),
    (lambda t: t.clear(), "holds no tensors"),
    (lambda t: t.update({A: t[A].astype("float64")}), "dtype F64"),
    (lambda t: t.update({A: t[A].astype("int32")}), "dtype I32"),
    (lambda t: t.update({A: t[A][0]}), "expected two dimensions"),
    (lambda t: t.update({A: t[A][:0]}), "none of them 0"),
    (lambda t: t.update({A: t[A][:, :-1].copy()}), "has (out, in) features (32, 31)"),
    (lambda t: t.update({B: t[B][:-1]}), "has (out, in) features (31, 32)"),
    (lambda t: t.update({A: t[A][:3]}), "expected rank 4"),
    (lambda t: t.update({B: t[B][:, :3].copy()}), "expected rank 4"),
    (lambda t: t.update({key.replace("layers.0", "layers.9"): t[key] for key in (A, B)}), "no linear module"),
    (lambda t: t.update({f"{Q}.lora_magnitude_vector": t[A]}), "expected only names like"),
    (lambda t: t.update({f"{Q}.lora_B.bias": t[A]}), "expected only names like"),
    (lambda t: t.update({"base_model.model.lm_head.weight": t[A]}), "expected only names like"),
    (lambda t: t.update({"model.layers.0.lora_A.weight": t[A]}), "expected only names like"),
    (lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": t[A]}), "LoRA on embeddings"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_TENSORS, ids=[message for _, message in BAD_TENSORS])
def test_tensors_that_are_refused(tmp_path: Path, spoil: Callable[[Tensors], object], message: str) -> None:
    tensors = lora_tensors()
    spoil(tensors)
    assert message in refusal(write_peft_folder(tmp_path, tensors=tensors))


def test_without_the_base_model_shapes_are_not_compared(tmp_path: Path) -> None:
    tensors = {key.replace("layers.0", "layers.9"): value for key, value in lora_tensors().items()}
    assert not admit(write_peft_folder(tmp_path, tensors=tensors), TINY_BASE, None).checked_shapes


def test_rank_is_limited(tmp_path: Path) -> None:
    assert f"at most {MAX_RANK}" in refusal(write_peft_folder(tmp_path, rank=MAX_RANK + 1))


def test_size_is_limited(tmp_path: Path) -> None:
    assert "expected at most 100" in refusal(write_peft_folder(tmp_path), max_bytes=100)


@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pth"])
def test_pickles_are_never_opened(tmp_path: Path, file: str) -> None:
    write_peft_folder(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    os.mkfifo(tmp_path / file)  # opening it would wait for ever
    assert f"found {file}, which may hold code and was not opened" in refusal(tmp_path)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_files(tmp_path: Path, file: str) -> None:
    (write_peft_folder(tmp_path) / file).unlink()
    assert "is missing" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"1234567", b"\xff" * 64, (10).to_bytes(8, "little") + b"not json!!", (1 << 40).to_bytes(8, "little")],
)
def test_damaged_weights(tmp_path: Path, content: bytes) -> None:
    (write_peft_folder(tmp_path) / "adapter_model.safetensors").write_bytes(content)
    assert "not a whole safetensors file" in refusal(tmp_path)


def test_truncated_weights(tmp_path: Path) -> None:
    file = write_peft_folder(tmp_path) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "not a whole safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe\xfa", "not valid JSON"),
        (b"[1]", "expected a JSON object"),
        (b"[" * 100_000, "not valid JSON"),
        (b" " * (2 << 20), "expected at most"),
    ],
    ids=["cut", "bytes", "list", "deep", "large"],
)
def test_damaged_configurations(tmp_path: Path, content: bytes, message: str) -> None:
    (write_peft_folder(tmp_path) / "adapter_config.json").write_bytes(content)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, file: str) -> None:
    write_peft_folder(tmp_path / "a")
    (tmp_path / "a" / file).rename(tmp_path / "elsewhere")
    (tmp_path / "a" / file).symlink_to(tmp_path / "elsewhere")
    assert "is a link to" in refusal(tmp_path / "a")


def test_the_layout_of_the_hub_cache_is_admitted(tmp_path: Path) -> None:
    repo, files = tmp_path / "models--o--n", write_peft_folder(tmp_path / "a")
    snapshot = repo / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(files.iterdir())):
        file.rename(repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    admit(snapshot, TINY_BASE, TINY_SPEC)


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    (write_peft_folder(tmp_path) / "adapter_model.safetensors").unlink()
    os.mkfifo(tmp_path / "adapter_model.safetensors")
    assert "not a regular file" in refusal(tmp_path)


def test_the_digest_sees_weights_and_meaning_of_the_configuration(tmp_path: Path) -> None:
    def digest(name: str, **options: Any) -> str:
        return admit(write_peft_folder(tmp_path / name, **options), TINY_BASE, TINY_SPEC).digest

    first = digest("a")
    assert digest("b") == first
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    (tmp_path / "b/adapter_config.json").write_text(json.dumps(dict(reversed(config.items())), indent=4))
    assert admit(tmp_path / "b", TINY_BASE, TINY_SPEC).digest == first
    assert len({first, digest("c", seed=1), digest("d", alpha=16)}) == 3
    # Where two patterns match, the first one counts: their order is a part of the meaning.
    one, two = {"q_proj": 1, "self_attn.q_proj": 2}, {"self_attn.q_proj": 2, "q_proj": 1}
    assert digest("e", config={"alpha_pattern": one}) != digest("f", config={"alpha_pattern": two})


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("o/Model-1", "o/model-1", True),
        ("/models/model-1/", "o/model-1", True),
        ("o/model-1", "o/model-2", False),
        ("", "o/model-1", False),
        ("", "", False),
    ],
)
def test_names_of_the_same_base_model(one: str, other: str, same: bool) -> None:
    assert same_base(one, other) is same


def test_the_limit_of_size_names_a_remedy_that_exists(tmp_path: Path) -> None:
    message = refusal(write_peft_folder(tmp_path), max_bytes=100)
    assert "from Python: pool.add(..., max_bytes=...)" in message
