"""What clients send and get at /v1/adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import BaseModel, Field, StrictBool, StringConstraints

from loraretriever.pool.samples import MAX_SAMPLES
from loraretriever.server.schemas import Body, Name, Prompt, Text
from loraretriever.types import Adapter, Sample

MAX_TAGS = 64
Description = Annotated[Text, StringConstraints(max_length=10_000)]
Tags = Annotated[list[Annotated[Text, StringConstraints(min_length=1, max_length=128)]], Field(max_length=MAX_TAGS)]
Samples = Annotated[list[Prompt], Field(min_length=1, max_length=MAX_SAMPLES)]


class AdapterDetails(Body):
    """What is said of an adapter that is added, whatever way it comes."""

    name: Name | None = Field(None, description="By default that of the folder or repository; uploads need one.")
    description: Description = Field("", description="What it does, in a sentence.")
    tags: Tags = Field(default_factory=list)
    tenant: Annotated[Text, StringConstraints(max_length=128)] | None = Field(
        None, description="For operators: whom it is to belong to; the empty string: nobody."
    )
    allow_base_mismatch: bool = Field(False, description="Take it although it names another base model.")


class AdapterSource(AdapterDetails):
    """POST /v1/adapters with JSON: an adapter that is somewhere already."""

    source: Annotated[Text, StringConstraints(min_length=1, max_length=4096)] = Field(
        description="A folder below the server's adapter root, or owner/name[@revision] on the Hugging Face hub."
    )
    samples: Samples | None = Field(None, description="Prompts it is meant for; by default those that come with it.")


class AdapterChange(Body):
    """PATCH /v1/adapters/{name}: what is left out stays as it is."""

    enabled: StrictBool | None = None
    description: Description | None = None
    tags: Tags | None = None


class MoreSamples(Body):
    """POST /v1/adapters/{name}/samples."""

    samples: Samples
    counter: StrictBool = Field(False, description="They are prompts that the adapter must not be chosen for.")


class AllSamples(Body):
    """PUT /v1/adapters/{name}/samples: these in place of those that there are."""

    samples: Samples
    counter_samples: Annotated[list[Prompt], Field(max_length=MAX_SAMPLES)] | None = Field(
        None, description="Left out, those that there are stay."
    )


class AdapterObject(BaseModel):
    """An adapter as clients see it."""

    name: str
    object: Literal["adapter"] = "adapter"
    revision: int
    digest: str = Field(description="SHA-256 of configuration and weights.")
    enabled: bool
    description: str
    tags: list[str]
    tenant: str | None = Field(None, description="Shown to operators: whom it belongs to.")
    shared: bool = Field(description="It belongs to nobody, and everybody may use it.")
    base_model: str
    source: str = Field(description="A repository on the hub, a folder's name, or 'upload'.")
    created: int = Field(description="Seconds since 1970.")
    ranks: list[int]
    targets: list[str]
    bytes: int
    samples: int


class AdapterList(BaseModel):
    """A page of adapters, by name."""

    object: Literal["list"] = "list"
    data: list[AdapterObject]
    has_more: bool


class DeletedAdapter(BaseModel):
    """An adapter that is no longer in the pool."""

    name: str
    object: Literal["adapter"] = "adapter"
    deleted: Literal[True] = True


class SampleObject(BaseModel):
    """A prompt, and where it came from."""

    text: str
    source: str


class SampleList(BaseModel):
    """All samples of an adapter."""

    samples: list[SampleObject]
    counter_samples: list[SampleObject]


def adapter_object(adapter: Adapter, name: str, show_tenant: bool) -> AdapterObject:
    """An adapter under the name by which the client knows it, without paths of the server."""
    details = {"tenant": adapter.tenant} if show_tenant else {}
    return AdapterObject(
        name=name,
        object="adapter",
        revision=adapter.revision,
        digest=adapter.digest,
        enabled=adapter.enabled,
        description=adapter.description,
        tags=list(adapter.tags),
        shared=adapter.tenant is None,
        base_model=_last_part(adapter.base_model),
        source=_last_part(adapter.source),
        created=int(adapter.created.timestamp()),
        ranks=list(adapter.ranks),
        targets=list(adapter.targets),
        bytes=adapter.size,
        samples=adapter.samples,
        **details,
    )


def sample_list(samples: Sequence[Sample], counter_samples: Sequence[Sample]) -> SampleList:
    """An adapter's samples."""

    def objects(each: Sequence[Sample]) -> list[SampleObject]:
        return [SampleObject(text=sample.text, source=sample.source) for sample in each]

    return SampleList(samples=objects(samples), counter_samples=objects(counter_samples))


def _last_part(name: str) -> str:
    return PurePath(name).name if PurePath(name).is_absolute() else name
