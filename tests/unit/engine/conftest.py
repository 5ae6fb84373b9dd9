from __future__ import annotations

from collections.abc import Iterator

import pytest

from loraretriever.models import BaseModel
from loraretriever.pool import Pool
from tiny import TINY_BASE, TINY_SPEC, lora_tensors, tiny_llama, write_peft_folder
from tiny_text import tiny_tokenizer


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel(TINY_BASE, tiny_llama(), tiny_tokenizer())


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Six adapters of ranks 1 to 6, strong enough to change the greedy answers."""
    folder = tmp_path_factory.mktemp("engine")
    with Pool.create(folder / "pool", TINY_BASE, spec=TINY_SPEC) as pool:
        for seed in range(6):
            tensors = {key: 8 * value for key, value in lora_tensors(rank=seed + 1, seed=seed).items()}
            source = write_peft_folder(folder / f"a{seed}", rank=seed + 1, tensors=tensors)
            pool.add(source, samples=[f"sample {seed}"])
        yield pool
