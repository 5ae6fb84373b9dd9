"""Lanes against the plain formula, and on another version; run by vLLM's interpreter (see test_vllm_lanes.py)."""

from types import SimpleNamespace

import torch
import vllm

from loraretriever.cluster import vllm_lanes
from loraretriever.cluster.vllm_lanes import LanesPunica, LanesScheduling, install
from loraretriever.compose.lanes import Lane, folder_id, lane_path
from loraretriever.errors import InvalidInputError
from loraretriever.types import Mixer

SLOTS, RANK, INS, OUTS = 6, 4, 12, (10, 6)  # a module of two slices, as q/k/v of three
LANES = {
    1: Lane(("a", "b"), (0.5, 0.3)),
    2: Lane(("c",), (-0.7,)),
    3: Lane(("a", "c", "d"), (0.6, 0.3, 0.1), Mixer.PARAMETERS),
}
PLACES = {"a": 4, "b": 0, "c": 1, "d": 5}
TOKENS = (1, 1, 1, 1, 1, 1, 2, 1, 3, 0, 2, 2, 3, 3, 3, 0, 0)
SAMPLED = (1, 2, 1, 3, 0)


def update(a, b, lane, x):
    """By the formulas of `Mixer`."""
    places = [PLACES[folder] for folder in lane.folders]
    if lane.mixer is Mixer.OUTPUTS:
        return sum(w * b[p, 0] @ (a[p, 0] @ x) for p, w in zip(places, lane.weights))
    mean_a = sum(w * a[p, 0] for p, w in zip(places, lane.weights))
    return sum(w * b[p, 0] for p, w in zip(places, lane.weights)) @ (mean_a @ x)


def check_product():
    torch.manual_seed(0)
    a = tuple(torch.randn(SLOTS, 1, RANK, INS) for _ in OUTS)
    b = tuple(torch.randn(SLOTS, 1, out, RANK) for out in OUTS)
    head_a, head_b = torch.randn(SLOTS, 1, RANK, INS), torch.randn(SLOTS, 1, 9, RANK)
    head = SimpleNamespace(lora_a_stacked=head_a, lora_b_stacked=head_b)
    punica = LanesPunica(64, 16, "cpu")
    for slot in PLACES.values():
        punica.fill(SimpleNamespace(lora_a_stacked=a, lora_b_stacked=b), slot, is_empty=False)
        punica.fill(head, slot, is_empty=False)
    punica.lanes = LANES
    layout = [None] * SLOTS
    for folder, place in PLACES.items():
        layout[place] = folder_id(folder)
    punica.update_metadata(SimpleNamespace(index_mapping=TOKENS, prompt_mapping=SAMPLED), layout, SLOTS + 1, 100)
    x = torch.randn(len(TOKENS), INS)
    y = torch.randn(len(TOKENS), sum(OUTS))
    before = y.clone()
    punica.add_lora_linear(y, x, a, b, 1.0, OUTS)
    for row, number in enumerate(TOKENS):
        lane = LANES.get(number)
        added = torch.cat([update(*pair, lane, x[row]) for pair in zip(a, b)]) if lane else 0
        torch.testing.assert_close(y[row], before[row] + added, rtol=1e-5, atol=1e-5)
    logits, states = torch.zeros(len(SAMPLED), 11), torch.randn(len(SAMPLED), INS)  # padded by two
    punica.add_lora_logits(logits, states, head_a, head_b, 1.0)
    for row, number in enumerate(SAMPLED):
        lane = LANES.get(number)
        expected = update(head_a, head_b, lane, states[row]) if lane else torch.zeros(9)
        torch.testing.assert_close(logits[row, :9], expected, rtol=1e-5, atol=1e-5)
        assert not logits[row, 9:].any()
    unused = tuple(torch.zeros(SLOTS, 1, RANK, INS) for _ in OUTS)  # of a module that no adapter has
    after = y.clone()
    punica.add_lora_linear(y, x, unused, b, 1.0, OUTS)
    assert torch.equal(y, after)


class Queue(list):
    def remove_requests(self, requests):
        self[:] = [each for each in self if each not in requests]

    add_request = list.append


class Plain:
    """Admits all that wait, as vLLM's would with memory enough."""

    def schedule(self):
        admitted = list(self.waiting)
        self.waiting.clear()
        return admitted


class Scheduler(LanesScheduling, Plain):
    lora_config = SimpleNamespace(max_loras=3)


class Asked:
    def __init__(self, *folders):
        path = lane_path(Lane(folders, (1.0,) * len(folders)))
        self.lora_request = SimpleNamespace(lora_name="x", lora_path=path) if folders else None


def check_scheduling():
    scheduler = Scheduler()
    scheduler.running = [Asked("a"), Asked()]
    first, second, third, fourth = Asked("a", "b"), Asked("c", "d"), Asked("b", "c"), Asked()
    scheduler.waiting = Queue([first, second, third, fourth])
    assert scheduler.schedule() == [first, third, fourth], "the second would need five slots"
    assert scheduler.waiting == [second]
    scheduler.running = []
    assert scheduler.schedule() == [second] and scheduler.waiting == []


def check_version():
    vllm.__version__ = "0.99.0"
    try:
        install(0)
    except InvalidInputError as error:
        assert "vllm_lanes is set, and this is vLLM 0.99.0" in str(error)
    else:
        raise AssertionError("another version was taken")


if __name__ == "__main__":
    assert vllm_lanes.VERSIONS == ("0.32.0",)
    check_product()
    check_scheduling()
    check_version()
