import importlib.util
import sys
from functools import partial

import pytest
import torch
from tests.store import small_store
from tests.store.small_store import SmallTeacher, files_of, make_batches, make_store, settings

from limbeck.core.errors import EnvironmentFault
from limbeck.store.store import TargetStore
from limbeck.teachers.capture import describe, plan_shards
from limbeck.teachers.ray_capture import ShardScorer, capture_with_ray, pack_plan, unpack_plan

WORDS = {"teacher": small_store.TEACHER, "tokenizer": "t0", "token_bytes": small_store.TOKEN_BYTES}


def plans():
    counts = {"new_rows": 0, "duplicates": 0}
    return list(plan_shards(make_batches(), known=set(), rows_per_shard=4, first=0, counts=counts))


def test_plans_travel_as_plain_values():
    for plan in plans():
        item = pack_plan(plan)
        assert {type(value) for value in item.values()} <= {int, bytes, list}
        back = unpack_plan(item)
        assert (back.number, back.keys, len(back.parts)) == (plan.number, plan.keys, len(plan.parts))
        for one, two in zip(plan.parts, back.parts, strict=True):
            for name in ("input_ids_BT", "loss_mask_BT", "document_ids_BT", "position_ids_BT"):
                a, b = getattr(one, name), getattr(two, name)
                assert (a is None and b is None) or (torch.equal(a, b) and a.dtype == b.dtype)


def test_a_worker_makes_the_shards_that_capture_makes(tmp_path):
    make_store(tmp_path / "s", k=6, hidden=(1,))
    manifest = describe(settings(k=6, hidden=(1,)), small_store.TEACHER, "t0", 4, 13, {1: 8})
    worker = ShardScorer(SmallTeacher, settings(k=6, hidden=(1,)), manifest, small_store.TOKEN_BYTES, "cpu")
    for plan, facts in zip(plans(), TargetStore(tmp_path / "s").manifest.shards, strict=True):
        made = worker(pack_plan(plan))
        assert made["content"] == (tmp_path / "s" / facts.file).read_bytes()
        assert (made["number"], made["keys"]) == (plan.number, list(plan.keys))
        assert (made["tokens"], made["scored_tokens"]) == (facts.tokens, facts.scored_tokens)


def test_without_ray_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'limbeck\[ray\]'"):
        capture_with_ray(SmallTeacher, make_batches(), tmp_path / "s", settings=settings(), **WORDS)
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_ray_writes_the_same_store_and_goes_on_after_a_stop(tmp_path):
    import ray

    make_store(tmp_path / "one", hidden=(1,))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        words = WORDS | {"settings": settings(hidden=(1,)), "hidden_width": {1: 8}}
        facts = capture_with_ray(partial(SmallTeacher), make_batches(), tmp_path / "ray", workers=2, **words)
        assert (facts["rows"], facts["shards"], facts["finished"]) == (18, 5, True)
        assert files_of(tmp_path / "ray") == files_of(tmp_path / "one")
        asked = iter(range(2))
        make_store(tmp_path / "half", hidden=(1,), should_stop=lambda: next(asked, None) is None)
        capture_with_ray(partial(SmallTeacher), make_batches(), tmp_path / "half", workers=1, **words)
        assert files_of(tmp_path / "half") == files_of(tmp_path / "one")
    finally:
        ray.shutdown()
