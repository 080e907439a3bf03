"""What is asked of many tensors at once, in C and in Python: the same answers."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from fastreg.ops.kinds import kinds_of
from fastreg.ops.multi_tensor import bulk


@pytest.fixture(params=["c", "python"])
def way(request, monkeypatch) -> str:
    if request.param == "python":
        monkeypatch.setattr(bulk, "_compiled", lambda: None)
    elif bulk._compiled() is None:
        pytest.skip("needs Triton, and a C compiler with the headers of Python")
    return request.param


class WithOwn(torch.Tensor):
    """A subclass with ideas of its own about everything that is asked."""

    grad = "its own"

    def data_ptr(self):
        return 12


def test_gradients(way):
    params = [nn.Parameter(torch.ones(i)) for i in range(3)]
    params[1].grad = torch.ones(1)
    own = torch.ones(2).as_subclass(WithOwn)
    found = bulk.gradients([*params, own])
    assert [x is y for x, y in zip(found, [None, params[1].grad, None, "its own"], strict=True)] == [True] * 4
    assert bulk.gradients([]) == []
    with pytest.raises(AttributeError):
        bulk.gradients([3])


def test_addresses(way):
    x = torch.ones(5, 4)
    tensors = [x, x[1, 2:], nn.Parameter(torch.ones(3)), torch.ones(0), None, x.as_subclass(WithOwn), x.T]
    for found in (
        bulk.addresses(tensors),
        bulk.addresses(tensors, True),
        bulk.addresses(tuple(tensors), True),
    ):
        assert found.dtype == np.int64
        expected = [-1 if t is None else t.data_ptr() for t in tensors]
        assert found.tolist() == expected
    assert bulk.addresses([x, x[1, 2:]], True).tolist() == [x.data_ptr(), x.data_ptr() + 24]
    assert bulk.addresses([], True).tolist() == []


def test_addresses_in_dicts_are_those_of_their_last_tensors(way):
    x, y = torch.ones(5), nn.Parameter(torch.ones(4))
    dicts = [{"a": y, "b": x, "c": 1.0}, {}, {"a": None}, 7, {"own": x.as_subclass(WithOwn)}, {"y": y}]
    expected = [x.data_ptr(), -1, -1, -1, -1, y.data_ptr()]
    for known in (False, True):
        assert bulk.addresses([], known, dicts).tolist() == expected
        assert bulk.addresses([y, None], known, iter(dicts)).tolist() == [y.data_ptr(), -1, *expected]


def test_a_tensor_that_lies_nowhere_is_an_error(way):
    """And no end of the process, as in C: so the first question is Python's."""
    with pytest.raises(RuntimeError, match=r"data pointer|storage"):
        bulk.addresses([torch.ones(1), torch.ones(2).to_sparse()])


def test_memory_that_moves_has_another_address(way):
    p = nn.Parameter(torch.ones(3))
    before = bulk.addresses([p])
    kept = p.data
    p.data = torch.ones(3)
    assert bulk.addresses([p], True) != before
    p.data = kept
    assert bulk.addresses([p], True) == before


def test_identities_are_those_of_objects_and_of_values_in_dicts(way):
    a, b = torch.ones(1), torch.ones(1)
    objects, dicts = [a, None, b], [{"x": a}, {}, {"y": b, "z": 3}]
    found = bulk.identities(objects, dicts)
    assert np.frombuffer(found, np.int64).tolist() == list(map(id, [a, None, b, a, b, 3]))
    assert found == bulk.identities(list(objects), iter(dicts))
    assert bulk.identities([], []) == b""
    assert bulk.identities([], [{"k": a}, 7, {"l": b}]) == bulk.identities(
        [a, b]
    )  # a state may hold other things
    many = [dict.fromkeys(range(100), a)]
    assert bulk.identities([], many) == bulk.identities([a] * 100)


def test_a_watch_knows_the_same_objects_again(way):
    objects, dicts = [torch.ones(1), None], [{"step": 1.0, "m": torch.ones(2)}]
    watch = bulk.Watch(objects, dicts)
    assert watch.finds(list(objects), [dict(dicts[0])])
    assert not watch.finds(objects[:1], dicts)
    assert not watch.finds([objects[0], objects[0]], dicts)
    assert not watch.finds(objects, [{**dicts[0], "m": torch.ones(2)}])
    assert not watch.finds(objects, [{**dicts[0], "n": 0}])
    assert not watch.finds(objects)
    assert watch.finds(objects, dicts)


def test_a_watch_holds_nothing_and_notices_ends(way):
    """An object in the place of one that has ended, with its very id, is another one."""
    objects = [torch.ones(1), torch.ones(2)]
    watch = bulk.Watch(objects)
    first, end = id(objects[0]), weakref.ref(objects[0])
    objects[0] = None
    gc.collect()
    assert end() is None
    kept = []
    for _ in range(1000):
        objects[0] = torch.ones(1)
        if id(objects[0]) == first:
            break
        kept.append(objects[0])
    assert not watch.finds(objects)


@pytest.fixture
def remembered():
    """A function that counts how often it is asked in earnest."""
    calls = []

    @bulk.remembered
    def build(*lists, **options):
        calls.append(options)
        return [x.shape for x in lists[0]]

    build.calls = calls
    return build


def test_results_are_remembered_while_tensors_lie_where_they_lay(way, remembered):
    a, b = [torch.ones(1), torch.ones(2)], [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2))]
    assert remembered(a, b) == remembered(list(a), list(b)) == [(1,), (2,)]
    assert len(remembered.calls) == 1
    b[1].data = torch.ones(3)
    remembered(a, b)
    assert len(remembered.calls) == 2
    a[0] = torch.ones(4)
    assert remembered(a, b) == [(4,), (2,)]
    assert len(remembered.calls) == 3
    remembered(a[:1], [a[1], *b])  # the same tensors, but other lists
    assert len(remembered.calls) == 4
    remembered(a, b, rows=True)
    remembered(a, b, rows=True)
    assert remembered.calls[4:] == [{"rows": True}]


def test_what_is_remembered_is_bounded_and_holds_no_tensor(way, remembered):
    first = [torch.ones(1)]
    for _ in range(2):
        remembered(first)
        for _ in range(bulk.REMEMBERED):
            lists = [torch.ones(1)]
            remembered(lists)
    assert len(remembered.calls) == 2 + 2 * bulk.REMEMBERED
    end = weakref.ref(lists[0])
    del lists
    assert end() is None


@pytest.fixture(params=["guards", "python"])
def kinds(request, monkeypatch) -> str:
    """How kinds are compared: by torch's guards, or where there are none."""
    if request.param == "python":
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    return request.param


def test_kinds_are_types_dtypes_devices_sizes_and_strides(kinds):
    def tensors():
        return [torch.ones(2, 3), nn.Parameter(torch.ones(4)), torch.ones(2, 2)]

    known = kinds_of(tensors())
    assert known.check(*tensors())
    for place, other in (
        (0, torch.ones(2, 3, dtype=torch.float64)),
        (0, torch.ones(2, 3, device="meta")),
        (0, torch.ones(3, 2).t()),
        (0, torch.ones(2, 4)),
        (0, torch.ones(6)),
        (1, torch.ones(4)),
    ):
        others = tensors()
        others[place] = other
        assert not known.check(*others)


def test_another_shape_or_layout_at_the_same_address_is_another_tensor(way, kinds, remembered):
    x = torch.ones(4, 4)
    for data in (x.data, x.data[:2], x.data.view(2, 8)[0].view(2, 4), x.data.t()):
        x.data = data
        assert remembered([x]) == remembered([x]) == [data.shape]
    assert len(remembered.calls) == 3
    x.data = torch.ones(4, 4).t()
    remembered([x])
    x.data = x.data.t()
    remembered([x])
    assert len(remembered.calls) == 5


def test_sparse_tensors_lie_nowhere_and_are_not_remembered(way, remembered):
    lists = [torch.ones(2).to_sparse(), torch.ones(1)]
    for _ in range(2):
        assert remembered(lists) == [(2,), (1,)]
    assert len(remembered.calls) == 2


def test_functional_transforms_are_asked_anew(way, remembered):
    x = [torch.ones(1)]
    remembered(x)
    torch.func.vmap(lambda y: (remembered(x), y)[1])(torch.ones(2))
    assert len(remembered.calls) == 2
