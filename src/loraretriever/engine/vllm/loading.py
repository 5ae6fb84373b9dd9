"""From settings to the engine over vLLM."""

from __future__ import annotations

from typing import Any

from loraretriever.compose.folders import open_folders
from loraretriever.config import Settings
from loraretriever.engine.vllm.backend import Backend
from loraretriever.engine.vllm.engine import VllmEngine
from loraretriever.models import end_ids, load_errors, load_tokenizer, resolve_base_model
from loraretriever.pool import Pool


def load_vllm_engine(pool: Pool, settings: Settings) -> VllmEngine:
    """An engine for a pool's adapters: vLLM's servers, or vLLM in this process.

    Raises:
        ModelLoadError: vLLM does not run or cannot be used, or the base model's tokenizer cannot be loaded.
    """
    name = settings.base_model or pool.base_model
    tokenizer = load_tokenizer(name)
    vocabulary, ends = _describe(name, tokenizer)
    folders = open_folders(pool, settings.vllm_cache_mib)
    backend: Backend
    if settings.vllm_urls:
        from loraretriever.engine.vllm.remote import RemoteBackend

        backend = RemoteBackend(settings.vllm_urls, settings.vllm_key, settings.vllm_timeout)
    else:
        from loraretriever.engine.vllm.inprocess import InProcessBackend

        backend = InProcessBackend(resolve_base_model(name), settings, folders)
    return VllmEngine(backend, folders, tokenizer, vocabulary, ends, queue=settings.queue, reduce=settings.vllm_reduce)


def _describe(name: str, tokenizer: Any) -> tuple[int, frozenset[int]]:
    """How many tokens a base model knows, and those that end an answer."""
    from transformers import AutoConfig, GenerationConfig

    source = resolve_base_model(name)
    with load_errors("configuration of the base model", name):
        config = AutoConfig.from_pretrained(source).get_text_config()
        try:
            generation = GenerationConfig.from_pretrained(source)
        except OSError:  # it has no settings of its own for generation
            generation = GenerationConfig.from_model_config(config)
    return int(config.vocab_size), end_ids(generation, tokenizer)
