"""What chapters 02 to 04 have no room for: compiling, devices, dtypes and errors."""

import copy
import math
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import eql_repro.kernels
from eql_repro import (
    ClassFrequency,
    EqualizationLoss,
    SoftmaxEqualizationLoss,
    equalization_loss,
    softmax_equalization_loss,
)

C = 6
FREQUENCY = ClassFrequency([1, 2, 4, 50, 80, 90], total=1000)
TAIL = FREQUENCY.tail(0.01)


def eql(**options):
    return EqualizationLoss(FREQUENCY, 0.01, **options)


def seql(**options):
    return SoftmaxEqualizationLoss(FREQUENCY, 0.01, **{"gamma": 0.5} | options)


def batch(n=8, background=True, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, C, generator=g, dtype=torch.float64).to(dtype)
    return z, torch.randint(0, C + background, (n,), generator=g)


def losses():
    """Both losses on labels, and EQL on float targets."""
    z, labels = batch()
    yield eql(), z, labels
    yield seql(), z, labels % C
    yield eql(threshold="gompertz"), z, F.one_hot(labels, C + 1)[:, :C].float()


# Compiling


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_full_graph(case, backend):
    torch._dynamo.reset()
    loss, z, target = list(losses())[case]
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    results = []
    for call in (loss, compiled):
        torch.manual_seed(0)
        leaf = z.clone().requires_grad_()
        value = call(leaf, target)
        value.backward()
        results.append((value.detach(), leaf.grad))
    assert torch.allclose(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1])


@pytest.mark.skipif(not shutil.which("cc"), reason="inductor needs a C compiler")
@pytest.mark.skipif(sys.platform == "win32", reason="inductor on Windows")
def test_full_graph_with_inductor():
    torch._dynamo.reset()
    z, labels = batch()
    compiled = torch.compile(eql(), fullgraph=True)
    assert torch.allclose(compiled(z, labels), eql()(z, labels))
    compiled = torch.compile(seql(gamma=1.0), fullgraph=True)
    assert torch.allclose(compiled(z, labels % C), seql(gamma=1.0)(z, labels % C))


def test_full_graph_for_several_gammas_and_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(softmax_equalization_loss, fullgraph=True, backend="eager")
    for n, gamma in [(8, 0.5), (9, 0.9), (10, 1.0), (0, 0.25), (11, 0.75)]:
        z, labels = batch(n, background=False)
        values = []
        for call in (softmax_equalization_loss, compiled):
            torch.manual_seed(1)
            values.append(call(z, labels, TAIL, gamma=gamma))
        assert torch.allclose(*values)


def test_compiled_with_a_generator_draws_outside_the_graph():
    torch._dynamo.reset()
    g = torch.Generator()
    loss = seql(generator=g)
    compiled = torch.compile(loss, backend="eager")
    z, labels = batch(64, background=False)
    values = []
    for call in (loss, compiled):
        g.manual_seed(3)
        values.append([call(z, labels) for _ in range(3)])
    assert torch.allclose(torch.stack(values[0]), torch.stack(values[1]))
    assert len({float(v) for v in values[0]}) == 3


@pytest.mark.parametrize("case", range(3))
def test_export_with_any_number_of_regions(case):
    loss, z, target = list(losses())[case]
    n = torch.export.Dim("n", min=2)
    program = torch.export.export(loss, (z, target), dynamic_shapes=({0: n}, {0: n}))
    z, target = z.repeat(2, 1), torch.cat([target, target])
    values = []
    for call in (loss, program.module()):
        torch.manual_seed(0)
        values.append(call(z, target))
    assert torch.allclose(*values)


# Devices


class NoSync(TorchDispatchMode):
    """Fail on operations that make the host wait for a device."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in self.WAITS, f"{name} waits for the device"
        return func(*args, **kwargs or {})


def test_the_sync_test_can_fail():
    with pytest.raises(AssertionError), NoSync():
        torch.ones(1).item()


@pytest.mark.parametrize("case", range(3))
def test_no_host_synchronisation(case, monkeypatch):
    loss, z, target = list(losses())[case]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # not on the CPU
    z.requires_grad_()
    with NoSync():
        loss(z, target).backward()


@pytest.mark.parametrize("case", range(3))
def test_no_value_is_read_on_a_device(case):
    loss, z, target = list(losses())[case]
    loss, z, target = loss.to("meta"), z.to("meta").requires_grad_(), target.to("meta")
    value = loss(z, target)
    value.backward()
    assert value.device.type == z.grad.device.type == loss.tail.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("case", range(3))
def test_on_a_gpu_without_synchronisation(case):
    loss, z, target = list(losses())[case]
    expected = (
        [loss(z, target)] if not isinstance(loss, SoftmaxEqualizationLoss) else []
    )
    loss, z, target = loss.cuda(), z.cuda().requires_grad_(), target.cuda()
    loss(z, target).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = loss(z, target)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.allclose(value.cpu(), e) for e in expected)
    assert value.isfinite() and value.is_cuda
    torch._dynamo.reset()
    assert torch.compile(loss, fullgraph=True)(z, target).isfinite()


# State


@pytest.mark.parametrize("make", [eql, seql])
@pytest.mark.parametrize("threshold", ["step", "exponential"])
def test_the_tail_is_a_buffer(make, threshold):
    loss = make(threshold=threshold)
    dtype = torch.bool if threshold == "step" else torch.float32
    assert not loss.state_dict() and loss.tail.dtype == dtype
    tail = loss.tail.clone()
    loss.load_state_dict(type(loss)(FREQUENCY, 0).state_dict())  # of another λ
    assert torch.equal(loss.tail, tail) and f"tail={int((tail > 0).sum())}" in repr(
        loss
    )
    assert torch.equal(copy.deepcopy(loss).half().tail.bool(), loss.tail.bool())


def test_half_modules_keep_the_cut():
    frequency = ClassFrequency([9, 10, 11], total=1000)
    assert EqualizationLoss(frequency, 0.01).half().tail.tolist() == [
        True,
        False,
        False,
    ]


def test_frequencies_may_be_a_tensor():
    z, labels = batch()
    given = EqualizationLoss(FREQUENCY.f, 0.01)
    assert torch.equal(given(z, labels), eql()(z, labels))
    assert torch.equal(eql()(z, labels), equalization_loss(z, labels, TAIL))


# Chance


def test_reproducible_from_its_generator():
    z, labels = batch(64, background=False)
    g = torch.Generator().manual_seed(7)
    loss = seql(generator=g)
    torch.manual_seed(1)
    first = [loss(z, labels) for _ in range(3)]
    torch.manual_seed(2)
    g.manual_seed(7)
    assert torch.equal(
        torch.stack(first), torch.stack([loss(z, labels) for _ in "abc"])
    )
    state = g.get_state()
    then = loss(z, labels)
    g.set_state(state)
    assert torch.equal(then, loss(z, labels)) and first[0] != first[1]


def test_the_global_generator_is_left_alone():
    z, labels = batch(background=False)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    seql(generator=torch.Generator())(z, labels)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_draw_does_not_depend_on_the_type(dtype):
    g = torch.Generator()
    ignored = []
    for z in (torch.zeros(200, C), torch.zeros(200, C, dtype=dtype)):
        g.manual_seed(0)
        loss = softmax_equalization_loss
        options = {"gamma": 0.95, "generator": g, "reduction": "none"}
        ignored.append(loss(z, torch.full((200,), 5), TAIL, **options))
    assert torch.equal(*ignored)


def test_per_sample_ignores_all_or_none():
    z, labels = torch.zeros(500, C), torch.full((500,), 5)
    options = {"gamma": 0.5, "reduction": "none"}
    torch.manual_seed(0)
    rows = softmax_equalization_loss(z, labels, TAIL, per_sample=True, **options)
    cells = softmax_equalization_loss(z, labels, TAIL, **options)
    assert {round(math.exp(v)) for v in rows.tolist()} == {3, 6}
    assert {round(math.exp(v)) for v in cells.tolist()} == {3, 4, 5, 6}


def test_defaults_are_those_of_the_paper():
    loss = SoftmaxEqualizationLoss(FREQUENCY, 0.01)
    assert (loss.gamma, loss.per_sample, loss.reduction) == (0.95, False, "mean")
    loss = EqualizationLoss(FREQUENCY)
    assert (loss.lambda_, loss.exclude_background) == (1.76e-3, True)
    z, labels = torch.zeros(500, C), torch.full((500,), 5)
    values = []
    for options in ({}, {"gamma": 0.95, "per_sample": False, "reduction": "mean"}):
        torch.manual_seed(0)
        values.append(softmax_equalization_loss(z, labels, TAIL, **options))
    assert values[0] == values[1]


# Numbers


@pytest.fixture(params=["formula", "one pass"])
def either_way(request, monkeypatch):
    block = {"formula": 2**18, "one pass": 1}[request.param]
    monkeypatch.setattr(eql_repro.kernels, "BLOCK", block)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [eql, seql])
def test_half_precision_is_computed_in_float32(either_way, make, dtype):
    z, labels = batch(background=False, dtype=dtype)
    leaf = z.clone().requires_grad_()
    torch.manual_seed(0)
    value = make()(leaf, labels)
    value.backward()
    torch.manual_seed(0)
    assert torch.equal(value.detach(), make()(z.float(), labels))
    assert value.dtype == torch.float32 and leaf.grad.dtype == dtype


@pytest.mark.parametrize("make", [eql, seql])
def test_autocast_changes_nothing(either_way, make):
    z, labels = batch(background=False)
    torch.manual_seed(0)
    expected = make()(z, labels)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(make()(z, labels), expected)


@pytest.mark.parametrize("make", [eql, seql])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 1e4), (torch.float16, 6e4), (torch.bfloat16, 6e4)],
)
@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_logits(either_way, make, dtype, size, sign):
    z = torch.full((C, C), -sign * size, dtype=dtype)
    z.fill_diagonal_(sign * size)
    value = make()(z.requires_grad_(), torch.arange(C))
    value.backward()
    assert value.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize("low", [-1e4, -1e8, -1e30])
def test_an_ignored_logit_is_out_however_low_the_target(either_way, low):
    z = torch.full((1, C), low)
    z[0, :3] = 1e4  # the tail
    value = softmax_equalization_loss(
        z.requires_grad_(), torch.tensor([5]), TAIL, gamma=1.0
    )
    value.backward()
    assert torch.isclose(value, torch.tensor(3.0).log())
    assert not z.grad[0, :3].any()
    changed = z.detach().clone()
    changed[0, :3] = -1e4
    same = softmax_equalization_loss(changed, torch.tensor([5]), TAIL, gamma=1.0)
    assert torch.equal(value.detach(), same)


@pytest.mark.parametrize("make", [eql, seql])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_regions(either_way, make, reduction):
    z = torch.zeros(0, C, requires_grad=True)
    (z * 1.0).sum().backward()
    value = make(reduction=reduction)(z, torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert value == 0 and value.requires_grad and z.grad.shape == (0, C)
    none = make(reduction="none")(z, torch.zeros(0, dtype=torch.int64))
    assert none.shape == ((0, C) if make is eql else (0,))


def test_lambda_zero_is_the_plain_loss():
    z, labels = batch(64)
    y = F.one_hot(labels, C + 1)[:, :C].float()
    for threshold in ("step", "exponential", "gompertz"):
        plain = EqualizationLoss(FREQUENCY, 0, threshold=threshold)
        bce = F.binary_cross_entropy_with_logits(z, y, reduction="none")
        assert torch.equal(plain(z, labels), bce.sum() / 64)
        plain = SoftmaxEqualizationLoss(FREQUENCY, 0, threshold=threshold)
        ce = F.cross_entropy(z, labels % C, reduction="none")
        assert torch.equal(plain(z, labels % C), ce.sum() / 64)


# The short way: a sum and its gradient in one pass


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(eql_repro.kernels, "BLOCK", 3 * C)  # 64 regions: 22 blocks


@pytest.mark.parametrize("e_r", [True, False])
@pytest.mark.parametrize("kind", ["step", "soft", "rows", "none"])
def test_blocks_are_the_matrices(small_blocks, kind, e_r):
    z, labels = batch(64, dtype=torch.float64)
    tails = {"step": TAIL, "soft": TAIL * 0.3 + 0.1, "none": TAIL & False}
    tail = tails.get(kind, torch.arange(64 * C).view(64, C) % 3 > 0)
    results = []
    for target in (labels, F.one_hot(labels, C + 1)[:, :C].double()):  # short, long
        leaf = z.clone().requires_grad_()
        value = equalization_loss(leaf, target, tail, exclude_background=e_r)
        value.backward()
        results.append((value.detach(), leaf.grad))
    assert torch.isclose(results[0][0], results[1][0], rtol=1e-14)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-14, atol=0)


@pytest.mark.parametrize("loss", [equalization_loss, softmax_equalization_loss])
def test_blocks_reduce_and_check_like_the_matrices(small_blocks, loss):
    z, labels = batch(64, background=False, dtype=torch.float64)
    values = {}
    for reduction in ("none", "sum", "mean"):
        torch.manual_seed(0)
        values[reduction] = loss(z, labels, TAIL, reduction=reduction)
    assert len(values["none"]) == 64
    assert torch.isclose(values["sum"], values["none"].sum(), rtol=1e-14)
    assert torch.isclose(values["mean"], values["none"].sum() / 64, rtol=1e-14)
    torch.manual_seed(0)
    soft = loss(z, labels, TAIL.double())
    assert torch.isclose(soft, values["mean"], rtol=1e-14)
    for wrong in (labels - 1, labels + C):
        with pytest.raises(ValueError, match="target"):
            loss(z, wrong, TAIL)
    with pytest.raises(TypeError, match="target"):
        loss(z, labels.int(), TAIL)


class Sizes(TorchDispatchMode):
    """Collect the bytes of all that is made."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.made[id(storage)] = (storage, storage.nbytes())  # kept: unique id
        return out

    def matrices(self, z):
        """How many tensors were made as large as z, itself aside."""
        own, size = z.untyped_storage(), z.untyped_storage().nbytes()
        pointers = {s.data_ptr() for s, n in self.made.values() if n >= size}
        return len(pointers - {own.data_ptr()})


def test_the_gradient_is_the_only_matrix(small_blocks):
    z, labels = batch(64)
    z.requires_grad_()
    counts = []
    for target in (labels, F.one_hot(labels, C + 1)[:, :C].float()):
        with Sizes() as sizes:
            eql()(z, target).backward()
        counts.append(sizes.matrices(z))
        z.grad = None
    assert counts[0] == 1 and counts[1] >= 6
    with Sizes() as sizes:
        seql()(z, labels % C).backward()
    assert sizes.matrices(z) == 1


def test_second_derivatives(small_blocks):
    z, labels = batch(8, dtype=torch.float64)
    z.requires_grad_()
    for loss in (eql(), eql(threshold="gompertz", exclude_background=False)):
        assert torch.autograd.gradgradcheck(lambda z, f=loss: f(z, labels), z)
    own = labels % C
    for loss in (seql(), seql(per_sample=True)):

        def same_draw(z, loss=loss):
            torch.manual_seed(0)
            return loss(z, own)

        assert torch.autograd.gradgradcheck(same_draw, z)


@pytest.mark.parametrize("make", [eql, seql])
def test_function_transforms(small_blocks, make):
    z, labels = batch(8, background=False, dtype=torch.float64)
    loss = make(**({"gamma": 1.0} if make is seql else {}))
    by_func = torch.func.grad(lambda z: loss(z, labels))(z)
    loss(z.requires_grad_(), labels).backward()
    assert torch.allclose(by_func, z.grad, rtol=1e-14, atol=0)
    if make is eql:  # a draw of β cannot be mapped
        many = torch.stack([z.detach(), z.detach() + 1])
        each = torch.stack([loss(x, labels) for x in many])
        assert torch.allclose(torch.vmap(lambda z: loss(z, labels))(many), each)
        mapped = torch.vmap(torch.func.grad(lambda z: loss(z, labels)))(many)
        assert torch.allclose(mapped[0], z.grad, rtol=1e-14, atol=0)
        own = torch.stack([labels, labels.flip(0)])  # labels of each, too
        each = torch.stack([torch.func.grad(loss)(many[i], own[i]) for i in (0, 1)])
        assert torch.allclose(torch.vmap(torch.func.grad(loss))(many, own), each)
        by = torch.tensor([1.0, -2.0], dtype=torch.float64)
        rows = torch.autograd.grad(loss(z, labels), z, by, is_grads_batched=True)[0]
        assert torch.allclose(rows, torch.stack([z.grad, -2 * z.grad]))


def test_soft_targets_and_a_soft_tail_have_gradients():
    z, _ = batch(4, dtype=torch.float64)
    y, tail = torch.rand(2, *z.shape, dtype=torch.float64)
    both = y.requires_grad_(), tail[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: equalization_loss(z, *x), both)
    plain = equalization_loss(z, y.detach(), tail[0])
    assert torch.equal(equalization_loss(z, *both), plain)


@pytest.mark.parametrize("make", [eql, seql])
def test_backward_twice_and_scaled(small_blocks, make):
    """The gradient that is kept is not changed by its use."""
    z, labels = batch(64, background=False)
    z.requires_grad_()
    loss = make()(z, labels)
    first = torch.autograd.grad(loss, z, retain_graph=True)[0].clone()
    half = torch.autograd.grad(loss / 2, z, retain_graph=True)[0]
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(half, first / 2) and torch.equal(z.grad, 2 * first)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("per_sample", [True, False])
def test_softmax_blocks_are_cross_entropy(small_blocks, gamma, per_sample):
    z, labels = batch(64, background=False, dtype=torch.float64)
    z = (30 * z).requires_grad_()
    options = {"gamma": gamma, "per_sample": per_sample}
    results = []
    for reduction in ("sum", "none"):  # short, long
        torch.manual_seed(0)
        call = softmax_equalization_loss
        value = call(z, labels, TAIL, reduction=reduction, **options).sum()
        results.append((value, *torch.autograd.grad(value, z)))
    assert torch.isclose(results[0][0], results[1][0], rtol=1e-13)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-13, atol=1e-15)


def test_logits_that_are_not_contiguous(small_blocks):
    z, labels = batch(64, background=False)
    for call in (eql(), seql(gamma=1.0)):
        grads = []
        for x in (z, z.t().contiguous().t(), z.repeat(1, 2)[:, :C]):
            leaf = x.detach().requires_grad_()
            call(leaf, labels).backward()
            grads.append(leaf.grad)
        for other in grads[1:]:  # another layout may round the last bit elsewhere
            torch.testing.assert_close(other, grads[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", [eql, seql])
def test_a_nan_shows(small_blocks, make):
    z, labels = batch(64, background=False)
    z[40, 5] = torch.nan
    value = make()(z.requires_grad_(), labels)
    value.backward()
    assert value.isnan() and z.grad[40, 5].isnan()


def test_a_soft_tail_scales_the_denominator():
    z = torch.zeros(1, 3, dtype=torch.float64)
    tail = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    value = softmax_equalization_loss(z, torch.tensor([0]), tail, gamma=1.0)
    assert math.isclose(value.item(), math.log(1.75))


def test_a_tail_for_each_region():
    z, labels = batch()
    rows = TAIL.repeat(8, 1)
    assert torch.equal(
        equalization_loss(z, labels, rows), equalization_loss(z, labels, TAIL)
    )
    rows[0] = False
    terms = equalization_loss(z, labels, rows, reduction="none")
    assert (terms[0] > 0).all()


def test_a_square_batch_is_not_mixed_up():
    z, labels = torch.zeros(C, C), torch.full((C,), 5)
    terms = equalization_loss(z, labels, TAIL, reduction="none")
    assert not terms[:, :3].any() and (terms[:, 3:] > 0).all()


# Errors

Z, L = torch.zeros(2, C), torch.zeros(2, dtype=torch.int64)


def both(*args, **options):
    """Call both losses; each must raise."""
    with pytest.raises((ValueError, TypeError)) as first:
        equalization_loss(*args, **options)
    with pytest.raises((ValueError, TypeError)) as second:
        softmax_equalization_loss(*args, **options)
    assert first.type is second.type
    assert str(first.value).split()[0] == str(second.value).split()[0]
    raise first.value


ERRORS = {
    "C+1 logits": (lambda: both(torch.zeros(2, C + 1), L, TAIL), ValueError, "backgr"),
    "C-1 logits": (lambda: both(torch.zeros(2, C - 1), L, TAIL), ValueError, "tail"),
    "1-D logits": (lambda: both(torch.zeros(C), L, TAIL), ValueError, "logits"),
    "int logits": (lambda: both(Z.long(), L, TAIL), TypeError, "logits.*int64"),
    "long tail": (lambda: both(Z, L, TAIL.long()), TypeError, "tail.*int64"),
    "tail above 1": (lambda: both(Z, L, TAIL * 2.0), ValueError, "tail.*2"),
    "tail nan": (lambda: both(Z, L, TAIL * math.nan), ValueError, "tail"),
    "tail rows": (lambda: both(Z, L, TAIL.repeat(3, 1)), ValueError, "tail.*3, 6"),
    "list of logits": (lambda: both([[0.0]], L, TAIL), TypeError, "logits.*list"),
    "list of labels": (lambda: both(Z, [0, 1], TAIL), TypeError, "target.*list"),
    "NumPy's labels": (lambda: both(Z, L.numpy(), TAIL), TypeError, "target.*ndarray"),
    "counts as tail": (lambda: both(Z, L, FREQUENCY), TypeError, "tail.*ClassFreq"),
    "generator": (
        lambda: softmax_equalization_loss(Z, L, TAIL, generator=3),
        TypeError,
        "generator.*int",
    ),
    "tail device": (lambda: both(Z, L, TAIL.to("meta")), ValueError, "tail.*meta"),
    "short labels": (lambda: both(Z, L[:1], TAIL), ValueError, r"\[2\].*\[1\]"),
    "label -1": (lambda: both(Z, L - 1, TAIL), ValueError, "target.*-1"),
    "int32": (lambda: both(Z, L.int(), TAIL), TypeError, "int32"),
    "bool": (lambda: both(Z, L.bool(), TAIL), TypeError, "bool"),
    "reduction": (lambda: both(Z, L, TAIL, reduction="x"), ValueError, "reduction.*x"),
    "label C+1": (
        lambda: equalization_loss(Z, L + C + 1, TAIL),
        ValueError,
        r"target.*\[0, 6\].*7",
    ),
    "label C": (
        lambda: softmax_equalization_loss(Z, L + C, TAIL),
        ValueError,
        r"target.*\[0, 5\].*6",
    ),
    "float labels": (lambda: equalization_loss(Z, L + 0.0, TAIL), ValueError, "target"),
    "soft 2": (lambda: equalization_loss(Z, Z + 2, TAIL), ValueError, "target.*2"),
    "many-hot": (
        lambda: equalization_loss(Z, torch.ones(2, C).long(), TAIL),
        ValueError,
        "target.*several classes a region: float",
    ),
    "float": (lambda: softmax_equalization_loss(Z, Z, TAIL), TypeError, "target"),
    "lambda": (lambda: EqualizationLoss(FREQUENCY, -1), ValueError, "lambda_.*-1"),
    "lambda inf": (
        lambda: SoftmaxEqualizationLoss(FREQUENCY, math.inf),
        ValueError,
        "lambda_.*inf",
    ),
    "gamma": (lambda: seql(gamma=1.5), ValueError, "gamma.*1.5"),
    "gamma nan": (lambda: seql(gamma=math.nan), ValueError, "gamma"),
    "gamma call": (
        lambda: softmax_equalization_loss(Z, L, TAIL, gamma=-0.1),
        ValueError,
        "gamma.*-0.1",
    ),
    "gamma call above 1": (
        lambda: softmax_equalization_loss(Z, L, TAIL, gamma=1.1),
        ValueError,
        "gamma.*1.1",
    ),
    "module reduction": (lambda: eql(reduction="x"), ValueError, "reduction"),
    "threshold": (lambda: eql(threshold="x"), ValueError, "threshold"),
    "frequency": (lambda: EqualizationLoss([0.1]), TypeError, "frequency"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()
