"""vLLM in this process: its asynchronous engine, with adapters from folders."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncGenerator, Callable
from typing import Any

from loraretriever.compose.canonical import BASE
from loraretriever.compose.folders import AdapterFolders
from loraretriever.compose.pinned import adapter_id
from loraretriever.config import Settings
from loraretriever.engine.sampler import Sampled
from loraretriever.engine.vllm.backend import Job, Limits, Part
from loraretriever.errors import EngineEndedError, EngineError, InvalidInputError, LoraRetrieverError, ModelLoadError

_OWN = "base model"  # the name of the base model where it needs no adapter


class InProcessBackend:
    """vLLM's `AsyncLLM`. Needs the package vllm."""

    def __init__(self, source: str, settings: Settings, folders: AdapterFolders) -> None:
        """Remember how to start it.

        Args:
            source: the base model: a folder, or a hub id.
            settings: `slots`, `batch_size`, `dtype` and `vllm_rank` count.
            folders: where adapters come from.

        Raises:
            ModelLoadError: vLLM is not installed.
        """
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is for answers
        try:
            import vllm  # noqa: F401
        except ImportError as error:
            raise ModelLoadError(
                "the engine vllm was asked for without servers, and vLLM is not installed here; name its servers "
                "(--vllm-url), or install vLLM in this environment."
            ) from error
        self._source = source
        self._settings = settings
        self._folders = folders
        self._engine: Any = None
        self._ids = itertools.count()
        self._base = _OWN

    async def limits(self) -> Limits:
        """See `Backend`; loads the model."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        settings = self._settings
        try:
            arguments = AsyncEngineArgs(
                model=self._source,
                dtype=settings.dtype,
                enable_lora=True,
                max_loras=settings.slots,
                max_lora_rank=settings.vllm_rank,
                max_num_seqs=settings.batch_size,
            )
            self._engine = AsyncLLM.from_engine_args(arguments)
        except Exception as error:  # of vLLM: what it raises is not stated
            raise ModelLoadError(f"vLLM cannot load the base model {self._source!r}: {error}") from error
        # On a CPU vLLM gives rows without an adapter that of the last slot, when others of their batch have one.
        self._base = BASE if current_platform.is_cpu() else _OWN
        return Limits(self._engine.model_config.max_model_len, settings.vllm_rank, settings.slots, self._base)

    async def generate(self, job: Job, on_start: Callable[[], None]) -> AsyncGenerator[Part]:
        """See `Backend`."""
        from vllm.inputs import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError

        prompt = TokensPrompt(prompt_token_ids=list(job.tokens))
        if job.namespace:
            prompt["cache_salt"] = job.namespace
        adapter = await self._adapter(job.model)
        name = f"loraretriever-{next(self._ids)}"
        on_start()
        try:
            outputs = self._engine.generate(prompt, _parameters(job), name, lora_request=adapter)
            async for output in outputs:
                for each in output.outputs:
                    yield Part(each.index, tuple(_sampled(each)), each.finish_reason, output.num_cached_tokens)
        except ValueError as error:
            raise InvalidInputError(f"vLLM refuses the request: {error}") from error
        except EngineDeadError as error:
            raise EngineEndedError("vLLM has ended; its log says why. Start this program again.") from error
        except LoraRetrieverError:
            raise
        except Exception as error:  # of vLLM: what it raises is not stated
            raise EngineError(f"vLLM failed: {error!r}; send the request again.") from error

    async def close(self) -> None:
        """See `Backend`."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None  # it looks after itself once more when nobody holds it, which at exit is too late

    async def _adapter(self, model: str) -> Any:
        """VLLM's request for the adapter of a name."""
        from vllm.lora.request import LoRARequest

        if model == _OWN:
            return None
        folder = await asyncio.to_thread(self._folders.folder, model, self._settings.vllm_rank)
        return LoRARequest(model, adapter_id(model), str(folder))


def _parameters(job: Job) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = job.sampling
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        seed=sampling.seed,
        n=sampling.n,
        logprobs=sampling.logprobs,
        ignore_eos=sampling.ignore_end,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _sampled(output: Any) -> list[Sampled]:
    if not output.logprobs:
        return [Sampled(token) for token in output.token_ids]
    return [
        Sampled(token, among[token].logprob, tuple((each, value.logprob) for each, value in among.items()))
        for token, among in zip(output.token_ids, output.logprobs, strict=True)
    ]
