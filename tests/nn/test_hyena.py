"""The operator against its definition, and everything that must not change its numbers."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from limbeck.core.errors import RecipeError
from limbeck.nn.hyena import HyenaOperator
from limbeck.nn.kernels import active_kernels, available_kernels
from limbeck.nn.packing import document_buckets, repack_documents, unpack_documents
from limbeck.nn.reference import operate_slowly

WIDTH = 6
OPTIONS = {"implicit": {"filter_length": 19}, "explicit": {"filter_length": 19}, "modal": {"modes": 3}}
KINDS = list(OPTIONS)


def make(kind="modal", *, dtype=torch.float64, **options):
    operator = HyenaOperator(WIDTH, filter=kind, filter_options=OPTIONS[kind], **options).to(dtype)
    with torch.no_grad():
        operator.skip_bias.normal_()
        operator.short_bias.normal_()
    return operator.eval()


def hidden(length=29, *, rows=2, dtype=torch.float64):
    return torch.randn(rows, length, WIDTH).to(dtype)


@torch.no_grad()
def run_in_parts(operator, x, split, *, mask=None):
    state = operator.init_state(x.shape[0], device=x.device, dtype=x.dtype)
    outputs, place = [], 0
    for chunk in x.split(split, dim=1):
        part = None if mask is None else mask[:, place : place + chunk.shape[1]]
        outputs.append(operator.advance(chunk, state, mask_BT=part)[0])
        place += chunk.shape[1]
    assert state.length == x.shape[1]
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("short_conv", [1, 3, 4])
def test_outputs_are_those_of_the_definition(kind, order, short_conv):
    operator = make(kind, order=order, short_conv=short_conv, inner_width=5)
    for length in (1, 2, 31):
        x = hidden(length)
        with torch.no_grad():
            assert_close(operator(x), operate_slowly(operator, x))
        assert_close(operator(x), operate_slowly(operator, x))


def test_without_biases():
    operator = make(bias=False)
    assert operator.in_proj.bias is None
    assert operator.out_proj.bias is None
    x = hidden()
    assert_close(operator(x), operate_slowly(operator, x))
    assert_close(run_in_parts(operator, x, [4] + [1] * 25), operator(x))


def test_a_value_by_hand():
    operator = HyenaOperator(1, order=2, short_conv=1, filter="explicit", filter_options={"filter_length": 2})
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.zero_()
        operator.in_proj.weight.copy_(torch.tensor([[2.0], [3.0], [1.0]]))
        operator.short_weight.fill_(1.0)
        operator.filters[0].taps_CK.copy_(torch.tensor([[1.0, 10.0]]))
        operator.skip_bias.fill_(0.5)
        operator.out_proj.weight.fill_(1.0)
    x = torch.tensor([[[1.0], [2.0]]])
    # gated = 3 x^2 = 3, 12; convolved = 3, 42; with skip 4.5, 48; times gate_out 2 x = 9, 192
    assert_close(operator(x), torch.tensor([[[9.0], [192.0]]]))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_gradcheck(kind):
    operator = make(kind, inner_width=2)
    names = [name for name, _ in operator.named_parameters()]

    def forward(x, *values):
        return torch.func.functional_call(operator, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(
        forward, (hidden(5, rows=1).requires_grad_(), *operator.parameters()), fast_mode=True
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_does_not_move_the_past(kind):
    operator = make(kind, order=3)
    x = hidden(40)
    changed = x.clone()
    changed[:, 23:] += 100 * torch.randn(changed[:, 23:].shape).double()
    assert_close(operator(changed)[:, :23], operator(x)[:, :23], rtol=0, atol=1e-10 * float(changed.norm()) ** 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_token_by_token_equals_all_at_once(kind, order, dtype):
    operator = make(kind, order=order, dtype=dtype)
    x = hidden(150, dtype=dtype)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-9}[dtype]
    with torch.no_grad():
        expected = operator(x)
    for split in ([1] * 150, [67] + [1] * 83, [1, 2, 17, 1, 30, 16, 1, 82], [150], [50, 50, 50]):
        assert_close(run_in_parts(operator, x, split), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_every_prompt_length(kind):
    operator = make(kind, short_conv=4)
    x = hidden(24)
    expected = operator(x)
    for prompt in range(1, 24):
        assert_close(run_in_parts(operator, x, [prompt] + [1] * (24 - prompt)), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [2, 3])
def test_padding_on_the_left_changes_nothing(kind, order):
    operator = make(kind, order=order)
    x, padding = hidden(21), torch.tensor([0, 8])
    mask = torch.arange(21) >= padding[:, None]
    noise = torch.where(mask[..., None], x, 1e3)
    for given in (mask, mask.long(), mask.double()):
        padded = operator(noise, mask_BT=given)
        assert_close(padded[:1], operator(x[:1]))
        assert_close(padded[1:, 8:], operator(x[1:, 8:]))
    for split in ([1] * 21, [13] + [1] * 8, [5, 16]):
        assert_close(run_in_parts(operator, noise, split, mask=mask), padded)


def test_gradients_do_not_reach_padding():
    operator, x = make(order=3), hidden(12).requires_grad_()
    mask = torch.arange(12) >= torch.tensor([[0], [5]])
    (gradient,) = torch.autograd.grad((operator(x, mask_BT=mask) * mask[..., None]).sum(), x)
    assert_close(gradient[1, :5], torch.zeros_like(gradient[1, :5]))


DOCUMENTS = torch.tensor([[0] * 5 + [1] + [2] * 13 + [7] * 8 + [2] * 2, [3] * 29, [5, 4] * 14 + [5]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [2, 3])
def test_packed_documents_are_mixed_as_if_alone(kind, order):
    operator, x = make(kind, order=order, short_conv=4), hidden(29, rows=3)
    packed = operator(x, document_ids_BT=DOCUMENTS)
    for row, ids in enumerate(DOCUMENTS):
        _, sizes = torch.unique_consecutive(ids, return_counts=True)
        alone = [operator(part.unsqueeze(0)).squeeze(0) for part in x[row].split(sizes.tolist())]
        assert_close(packed[row], torch.cat(alone))


def test_gradients_of_packed_documents_are_those_of_documents_alone():
    operator, x = make(order=3), hidden(12, rows=1).requires_grad_()
    ids, upstream = torch.tensor([[0] * 5 + [1] * 7]), hidden(12, rows=1)
    inputs = (x, *operator.parameters())
    packed = torch.autograd.grad((operator(x, document_ids_BT=ids) * upstream).sum(), inputs)
    alone = torch.cat([operator(x[:, :5]), operator(x[:, 5:])], dim=1)
    assert_close(packed, torch.autograd.grad((alone * upstream).sum(), inputs))


def test_packed_documents_with_padding_after_them():
    operator, x = make(), hidden(12, rows=1)
    ids, mask = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3]), torch.arange(12)[None] < 9
    assert_close(operator(x, document_ids_BT=ids, mask_BT=mask)[:, 5:9], operator(x[:, 5:9]))


def test_one_document_a_row_is_the_plain_case():
    operator, x = make(), hidden(29)
    assert torch.equal(operator(x, document_ids_BT=DOCUMENTS[1].expand(2, -1)), operator(x))


def test_documents_are_unpacked_and_repacked_without_loss():
    u = torch.randn(3, 4, 29)
    buckets = document_buckets(DOCUMENTS)
    rows = [unpack_documents(u, index) for index in buckets]
    assert torch.equal(repack_documents(rows, buckets, batch=3, length=29), u)
    places = torch.cat([index.flatten() for index in buckets])
    assert torch.equal(places[places < 87].sort().values, torch.arange(87))
    assert len(places) < 2 * 87
    longest = [row for row in rows if row.shape[-1] == 29]
    assert torch.equal(longest[0][0], u[1])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_of_a_state_can_be_reordered_and_states_branched(kind):
    operator, x = make(kind, order=3), hidden(90, rows=3)
    state = operator.init_state(3, device="cpu", dtype=torch.float64)
    _, state = operator.advance(x[:, :40], state)
    branch = state.clone()
    operator.advance(hidden(20, rows=3), branch)
    operator.advance(hidden(1, rows=3), branch)
    rows = torch.tensor([2, 0, 0])
    state = state.map(lambda tensor: tensor.index_select(0, rows))
    assert (state.length, branch.length) == (40, 61)
    rest = torch.cat([operator.advance(x[rows, t : t + 1], state)[0] for t in range(40, 90)], dim=1)
    assert_close(rest, operator(x)[rows, 40:])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_a_chunk_and_not_into_the_past(kind):
    operator, x = make(kind), hidden(20).requires_grad_()
    state = operator.init_state(2, device="cpu", dtype=torch.float64)
    first, state = operator.advance(x[:, :12], state)
    second, state = operator.advance(x[:, 12:19], state)
    last, state = operator.advance(x[:, 19:], state)
    assert_close(torch.cat((first, second, last), dim=1), operator(x))
    (gradient,) = torch.autograd.grad(second.sum() + last.sum(), x)
    assert gradient[:, 12:].abs().min() > 0
    assert_close(gradient[:, :12], torch.zeros_like(gradient[:, :12]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_half_precision_model_stays_near_the_full_one(kind, dtype):
    operator, x = make(kind, dtype=torch.float32), hidden(40, dtype=torch.float32)
    half = copy.deepcopy(operator).to(dtype)
    expected, tolerance = operator(x), {torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    actual, stepped = half(x.to(dtype)), run_in_parts(half, x.to(dtype), [9] + [1] * 31)
    assert actual.dtype == stepped.dtype == dtype
    for output in (actual, stepped):
        assert float((output.float() - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_runs_forward_backward_and_stepping(kind):
    operator, x = make(kind, dtype=torch.float32), hidden(20, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = operator(x)
        stepped = run_in_parts(operator, x, [7] + [1] * 13)
    output.float().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in operator.parameters())
    assert float((stepped.float() - output.float()).norm() / output.float().norm()) < 0.05
    assert float((output.float() - operator(x)).norm() / output.float().norm()) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    operator, x = make(kind).train(), hidden().requires_grad_()
    inputs = (x, *operator.parameters())
    plain = torch.autograd.grad(operator(x).square().sum(), inputs)
    saved = torch.autograd.grad(checkpoint(operator, x, use_reentrant=False).square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, saved))


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_operator_gives_the_same_numbers(kind):
    operator, x = make(kind), hidden().requires_grad_()
    compiled = torch.compile(operator, backend="aot_eager")
    inputs = (x, *operator.parameters())
    assert_close(compiled(x), operator(x))
    assert_close(
        torch.autograd.grad(compiled(x).square().sum(), inputs), torch.autograd.grad(operator(x).square().sum(), inputs)
    )


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_saved_weights_give_the_same_outputs(kind, tmp_path):
    operator, x = make(kind), hidden()
    expected = operator(x)
    save_file(operator.state_dict(), tmp_path / "operator.safetensors")
    other = make(kind)
    other(x)
    other.load_state_dict(load_file(tmp_path / "operator.safetensors"))
    assert torch.equal(other(x), expected)
    assert torch.equal(copy.deepcopy(operator)(x), expected)


@torch.no_grad()
def test_a_hooked_or_replaced_projection_is_called_as_it_is():
    operator, x = make(), hidden()
    handle = operator.in_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    doubled = operator(x)
    handle.remove()
    twin = copy.deepcopy(operator)
    twin.in_proj.weight.mul_(2)
    twin.in_proj.bias.mul_(2)
    assert_close(doubled, twin(x))
    twin.in_proj = torch.nn.Sequential(twin.in_proj)
    assert_close(twin(x), doubled)


def test_what_must_not_decay_is_marked():
    for operator in (make("implicit"), copy.deepcopy(make("modal"))):
        marked = {name for name, p in operator.named_parameters() if getattr(p, "_no_weight_decay", False)}
        free = {"in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias"}
        assert marked == {name for name, _ in operator.named_parameters()} - free


def test_an_operator_can_be_made_on_the_meta_device_and_filled_later():
    for kind in KINDS:
        with torch.device("meta"):
            operator = HyenaOperator(WIDTH, filter=kind, filter_options=OPTIONS[kind])
        operator = operator.to_empty(device="cpu")
        operator.reset_parameters()
        assert torch.isfinite(operator(hidden(dtype=torch.float32))).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": 1}, "order must be at least 2"),
        ({"short_conv": 0}, "short_conv 0"),
        ({"filter": "modl"}, 'Did you mean "modal"'),
        ({"filter_options": {"mods": 3}}, "hyena.filter_options"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(RecipeError, match=words):
        HyenaOperator(WIDTH, **options)


def test_kernels_name_the_implementation_of_each_job():
    assert set(active_kernels().values()) == {"torch"}
    assert all(isinstance(found, bool) for found in available_kernels().values())
