"""What chapter 05 has no room for: dtypes, processes, state, compiling and errors."""

import copy
import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from eql_repro import ClassFrequency, EqualizationLoss
from eql_repro.rivals import (
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    ClassWeightedLoss,
    EQLv2,
    FocalLoss,
    LDAMLoss,
    SeesawLoss,
    SigmoidCrossEntropy,
    SoftmaxCrossEntropy,
    effective_number_weights,
    focal_terms,
    inverse_frequency_weights,
    seesaw_terms,
)

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["eql_repro.rivals"])
C = 6
COUNTS = [90, 80, 50, 4, 2, 1]
LOSSES = {
    "sigmoid": SigmoidCrossEntropy,
    "softmax": SoftmaxCrossEntropy,
    "focal": FocalLoss,
    "focal 0": lambda **o: FocalLoss(0, None, **o),
    "focal 0.5": lambda **o: FocalLoss(0.5, **o),
    "weighted": lambda **o: ClassWeightedLoss(ClassFrequency(COUNTS), **o),
    "balanced": lambda **o: ClassBalancedLoss(COUNTS, **o),
    "balanced sigmoid": lambda **o: ClassBalancedLoss(COUNTS, form="sigmoid", **o),
    "balanced focal": lambda **o: ClassBalancedLoss(COUNTS, form="focal", **o),
    "balanced softmax": lambda **o: BalancedSoftmaxLoss(COUNTS, **o),
    "ldam": lambda **o: LDAMLoss(COUNTS, **o),
    "eqlv2": lambda **o: EQLv2(C, **o),
    "seesaw": lambda **o: SeesawLoss(C, **o),
}
SIGMOID = [name for name, make in LOSSES.items() if make().activation == "sigmoid"]
SOFTMAX = [name for name in LOSSES if name not in SIGMOID]
COUNTING = ["eqlv2", "seesaw"]


def batch(n=8, background=False, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, C, generator=g, dtype=torch.float64).to(dtype)
    return z, torch.randint(0, C + background, (n,), generator=g)


def one_hot(labels):
    return F.one_hot(labels, C + 1)[:, :C].double()


def seasoned(name, **options):
    """A loss which has counted some batches, if it counts at all."""
    loss = LOSSES[name](**options)
    for seed in range(5):
        loss(*batch(64, name in SIGMOID, seed=seed + 10))
    return loss


# Limits


def test_at_their_limits_they_are_plain():
    z, labels = batch(64)
    _, regions = batch(64, background=True)
    bce = F.binary_cross_entropy_with_logits(z, one_hot(regions), reduction="sum") / 64
    ce = F.cross_entropy(z, labels)
    ones = torch.ones(C)
    sigmoid = [
        SigmoidCrossEntropy(),
        FocalLoss(0, None),
        ClassBalancedLoss(COUNTS, 0, form="sigmoid"),
        ClassBalancedLoss(COUNTS, 0, form="focal", gamma=0),
        ClassWeightedLoss(ones, form="sigmoid"),
        EQLv2(C),  # nothing counted
        EQLv2(C, mu=0, alpha=0),  # r = q = 1 at a ratio of 100
        EqualizationLoss(ClassFrequency(COUNTS), 0),
    ]
    softmax = [
        SoftmaxCrossEntropy(),
        ClassBalancedLoss(COUNTS, 0),
        ClassWeightedLoss(ClassFrequency(COUNTS), power=0),
        ClassWeightedLoss(ClassFrequency([7] * C)),
        BalancedSoftmaxLoss([7] * C),
        BalancedSoftmaxLoss(COUNTS, tau=0),
        LDAMLoss(COUNTS, max_margin=0, scale=1),
        SeesawLoss(C, p=0, q=0),
    ]
    for loss in sigmoid:
        assert torch.isclose(loss(z, regions), bce, rtol=1e-6), loss
    for loss in softmax:
        assert torch.isclose(loss(z, labels), ce, rtol=1e-6), loss


def test_away_from_their_limits_they_differ():
    z, labels = batch(64)
    values = {name: float(seasoned(name)(z, labels)) for name in LOSSES}
    del values["focal 0"]  # this one is the sigmoid
    assert len({round(v, 6) for v in values.values()}) == len(values)


def test_prior_and_margin_by_the_formula():
    z, labels = batch(64)
    n, y = torch.tensor(COUNTS).double(), F.one_hot(labels, C)
    tilted = F.cross_entropy(z + 0.5 * n.log(), labels)
    assert torch.isclose(BalancedSoftmaxLoss(COUNTS, 0.5)(z, labels), tilted)
    loss, terms = LDAMLoss(COUNTS), 30 * (z - y * 0.5 * n**-0.25)
    terms = F.cross_entropy(terms, labels, reduction="none")
    assert torch.isclose(loss(z, labels), terms.mean())
    loss.start_reweighting()
    weighted = effective_number_weights(COUNTS)[labels] * terms
    assert torch.isclose(loss(z, labels), weighted.mean())


def test_weights_beyond_the_limit_of_beta():
    inverse = inverse_frequency_weights(COUNTS)
    assert torch.allclose(effective_number_weights(COUNTS, 1), inverse)
    assert math.isclose(effective_number_weights(COUNTS).sum(), C)


# Gradients


def frozen(name):
    """A seasoned loss in evaluation mode, differentiable as it stands."""
    loss = seasoned(name, reduction="sum").eval()
    if name == "seesaw":
        loss.q = 0.0  # its second factor is held constant: not the derivative
    if name == "ldam":
        loss.scale = 3.0
        loss.start_reweighting()
    return loss


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    z, labels = batch(6, name in SIGMOID)
    loss = frozen(name)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), z.requires_grad_())


def test_the_second_factor_of_seesaw_is_held_constant():
    z, labels = batch(64)
    z = 4 * z  # some right classes fall below the floor
    loss = seasoned("seesaw", reduction="sum").eval()
    leaf = z.clone().requires_grad_()
    loss(leaf, labels).backward()
    score, y = z.softmax(1), F.one_hot(labels, C)
    n = loss.counts.double()
    own = score.gather(1, labels[:, None])
    s = (n / n[labels][:, None]).clamp(max=1) ** 0.8
    s = s * (score / own.clamp(min=0.01)).clamp(min=1) ** 2
    s = torch.where(y > 0, 1, s)
    weighted = s * z.exp()
    assert torch.allclose(leaf.grad, weighted / weighted.sum(1, keepdim=True) - y)


# Numbers


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("size", [1e4, 6e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits(name, dtype, size, sign):
    z = torch.full((C, C), -sign * size, dtype=dtype)
    z.fill_diagonal_(sign * size).requires_grad_()
    loss = seasoned(name)
    if name == "ldam":
        loss.start_reweighting()
    value = loss(z, torch.arange(C))
    value.backward()
    assert value.isfinite() and value.dtype == torch.float32
    assert z.grad.isfinite().all() and z.grad.dtype == dtype
    assert all(x.isfinite().all() for x in loss.state_dict().values())
    assert value > 100 if sign < 0 else value < 1


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name):
    z, labels = batch(dtype=torch.float16)
    assert torch.equal(
        seasoned(name).eval()(z, labels), seasoned(name).eval()(z.float(), labels)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = seasoned(name).eval()(z.float(), labels)
    assert torch.equal(inside, seasoned(name).eval()(z.float(), labels))


@pytest.mark.parametrize("gamma", [0, 0.1, 0.5, 0.9, 1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_focal_of_sure_logits(gamma, dtype):
    size = torch.tensor([5.0, 10, 15, 16, 17, 20, 36, 37, 50, 100, 1e4], dtype=dtype)
    z = torch.cat([size, -size])[:, None].requires_grad_()
    for label in (0, 1):  # 1: background
        target = torch.full((len(z),), label)
        terms = focal_terms(z, target, gamma=gamma)
        (g,) = torch.autograd.grad(terms.sum(), z)
        assert terms.isfinite().all() and g.isfinite().all()
        assert (g <= 0).all() if label == 0 else (g >= 0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_regions(name, reduction):
    z = torch.zeros(0, C, requires_grad=True)
    value = LOSSES[name](reduction=reduction)(z, torch.zeros(0, dtype=torch.int64))
    value.sum().backward()
    assert value.sum() == 0 and z.grad.shape == (0, C)
    shape = {"none": (0, C) if name in SIGMOID else (0,)}.get(reduction, ())
    assert value.shape == shape


@pytest.mark.parametrize("name", LOSSES)
def test_reductions(name):
    z, labels = batch()
    none, total, mean = (
        seasoned(name, reduction=r).eval()(z, labels) for r in ("none", "sum", "mean")
    )
    assert torch.isclose(none.sum(), total) and torch.isclose(total / 8, mean)


# Targets


@pytest.mark.parametrize("name", SIGMOID)
def test_labels_are_one_hot_rows_and_background_is_none(name):
    z, labels = batch(64, background=True)
    loss = seasoned(name, reduction="none").eval()
    terms = loss(z, labels)
    assert torch.equal(terms, loss(z, one_hot(labels)))
    behind = labels == C
    assert behind.any() and (terms[behind] > 0).any()
    zero = loss(z, torch.zeros_like(z))
    assert torch.equal(terms[behind], zero[behind])


def test_background_weighs_one_and_two_classes_their_mean():
    z = torch.zeros(3, 2)
    y = torch.tensor([[0.0, 0], [1, 1], [0.0, 1]])
    loss = ClassWeightedLoss([1.0, 4.0], form="sigmoid", reduction="none")
    weights = loss(z, y) / math.log(2)
    assert torch.allclose(weights[:, 0], torch.tensor([1, 2.5, 4]))


# State


@pytest.mark.parametrize("name", [*COUNTING, "ldam"])
def test_the_state_is_saved_and_restored(name, tmp_path):
    loss, fresh = seasoned(name), LOSSES[name]()
    if name == "ldam":
        loss.start_reweighting()
    torch.save(loss.state_dict(), tmp_path / "loss.pt")
    fresh.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    z, labels = batch(64)
    assert LOSSES[name]()(z, labels) != loss(z, labels) == fresh(z, labels)
    assert loss(z, labels) == fresh(z, labels)  # and they go on alike
    assert all(
        torch.equal(x, fresh.state_dict()[k]) for k, x in loss.state_dict().items()
    )


@pytest.mark.parametrize("name", COUNTING)
def test_only_training_counts(name):
    loss = seasoned(name)
    before = copy.deepcopy(loss.state_dict())
    loss.eval()(*batch(64))
    assert all(torch.equal(x, before[k]) for k, x in loss.state_dict().items())
    loss.train()(*batch(64))
    assert not any(torch.equal(x, before[k]) for k, x in loss.state_dict().items())


def test_eqlv2_counts_what_it_weighs():
    z, labels = batch(64, background=True)
    loss = EQLv2(C, reduction="sum")
    for _ in range(3):
        before = loss.positive.clone(), loss.negative.clone()
        leaf = z.clone().requires_grad_()
        loss(leaf, labels).backward()
        up, down = -leaf.grad.clamp(max=0).sum(0), leaf.grad.clamp(min=0).sum(0)
        assert torch.allclose(loss.positive - before[0], up.float(), atol=1e-5)
        assert torch.allclose(loss.negative - before[1], down.float(), atol=1e-5)


@pytest.mark.parametrize("name", COUNTING)
def test_a_half_module_counts_as_finely(name):
    loss = LOSSES[name]().half().bfloat16()
    z, labels = batch(64)
    for _ in range(100):
        loss(z, labels)
    expected = LOSSES[name]()
    for _ in range(100):
        expected(z, labels)
    for key, x in loss.state_dict().items():
        assert torch.equal(x, expected.state_dict()[key])
        assert x.dtype in (torch.float32, torch.int64)


# Processes


def share(out: str, rank: int) -> None:
    """Three steps of the counting losses on every second region, one of them empty."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{out}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    losses = {name: LOSSES[name](reduction="sum") for name in COUNTING}
    values = {name: [] for name in COUNTING}
    for step, n in enumerate([32, 1, 32]):  # of one region, rank 1 has none
        z, labels = batch(n, seed=step)
        for name, loss in losses.items():
            values[name].append(loss(z[rank::2], labels[rank::2]))
    states = {name: loss.state_dict() for name, loss in losses.items()}
    torch.save((states, values), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_count_as_one(tmp_path):
    pair = [CONTEXT.Process(target=share, args=(str(tmp_path), r)) for r in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in pair] == [0, 0]
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert not dist.is_initialized()
    for name in COUNTING:
        alone = LOSSES[name](reduction="sum")
        values = [alone(*batch(n, seed=s)) for s, n in enumerate([32, 1, 32])]
        for states, _ in both:
            for key, x in alone.state_dict().items():
                assert torch.allclose(states[name][key], x, rtol=1e-5), (name, key)
        joined = [a + b for a, b in zip(*(v[name] for _, v in both), strict=True)]
        assert torch.allclose(torch.stack(joined), torch.stack(values))


def test_a_batch_that_is_not_finite_leaves_no_trace():
    z, labels = batch(dtype=torch.float32)
    loss = EQLv2(C)
    loss(z, labels)
    before = copy.deepcopy(loss.state_dict())
    loss(z.clone().fill_(math.nan), labels)
    for key, x in loss.state_dict().items():
        assert torch.equal(x, before[key])


def test_weights_are_a_copy():
    weights = torch.ones(C)
    loss = ClassWeightedLoss(weights)
    weights.zero_()
    assert loss.weights.tolist() == [1] * C


# Compiling and devices


@pytest.mark.parametrize("name", LOSSES)
def test_full_graph(name):
    torch._dynamo.reset()
    z, labels = batch()
    loss, copied = seasoned(name), seasoned(name)
    compiled = torch.compile(copied, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        both = [z.clone().requires_grad_() for _ in range(2)]
        values = loss(both[0], labels), compiled(both[1], labels)
        assert torch.allclose(*values)
        sum(values).backward()
        assert torch.allclose(*(x.grad for x in both))
    for key, x in loss.state_dict().items():
        assert torch.allclose(x, copied.state_dict()[key])


@pytest.mark.parametrize("name", LOSSES)
def test_no_value_is_read_on_a_device(name):
    z, labels = batch(dtype=torch.float32)
    z = z.to("meta").requires_grad_()
    loss = LOSSES[name]().to("meta")
    value = loss(z, labels.to("meta"))
    value.backward()
    assert value.device.type == z.grad.device.type == "meta"


# Errors

Z, L = torch.zeros(2, C), torch.zeros(2, dtype=torch.int64)
CALLS = {
    "1-D logits": (Z[0], L, ValueError, "logits"),
    "int logits": (Z.long(), L, TypeError, "logits.*int64"),
    "list of logits": ([[0.0]], L, TypeError, "logits.*list"),
    "NumPy's labels": (Z, L.numpy(), TypeError, "target.*ndarray"),
    "short labels": (Z, L[:1], ValueError, r"target.*\[2\].*\[1\]"),
    "label -1": (Z, L - 1, ValueError, "target.*-1"),
    "label C+1": (Z, L + C + 1, ValueError, "target.*7"),
    "int32": (Z, L.int(), TypeError, "target.*int32"),
    "bool": (Z, L.bool(), TypeError, "target.*bool"),
}


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("name", LOSSES)
def test_errors_of_a_call_name_the_argument(name, case):
    z, target, kind, message = CALLS[case]
    loss = LOSSES[name]()
    before = copy.deepcopy(loss.state_dict())
    with pytest.raises(kind, match=message):
        loss(z, target)
    assert all(torch.equal(x, before[k]) for k, x in loss.state_dict().items())


@pytest.mark.parametrize("name", SOFTMAX)
def test_softmax_has_no_background_and_no_rows(name):
    with pytest.raises(ValueError, match=r"target.*\[0, 5\].*6"):
        LOSSES[name]()(Z, L + C)
    with pytest.raises(TypeError, match="target.*float32"):
        LOSSES[name]()(Z, Z)


@pytest.mark.parametrize("name", SIGMOID)
def test_rows_of_targets_are_checked(name):
    with pytest.raises(ValueError, match=r"target.*\[0, 1\].*2"):
        LOSSES[name]()(Z, Z + 2)
    with pytest.raises(ValueError, match="target.*logits"):
        LOSSES[name]()(Z, Z[:1])


KNOWN = set(LOSSES) - {"sigmoid", "softmax", "focal", "focal 0", "focal 0.5"}


@pytest.mark.parametrize("name", sorted(KNOWN))
@pytest.mark.parametrize("extra", [-1, 1])
def test_logits_of_another_number_of_classes(name, extra):
    with pytest.raises(ValueError, match=rf"\[C\].*\[2, {C + extra}\].*\[{C}\]"):
        LOSSES[name]()(torch.zeros(2, C + extra), L)


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_a_loss_on_another_device(name):
    with pytest.raises(ValueError, match="device.*cpu.*meta"):
        LOSSES[name]().to("meta")(Z, L)


HOLED = [3, 0, 1]
MAKES = {
    "reduction": (lambda: FocalLoss(reduction="x"), ValueError, "reduction.*'x'"),
    "gamma": (lambda: FocalLoss(-1), ValueError, "gamma.*-1"),
    "gamma nan": (lambda: FocalLoss(math.nan), ValueError, "gamma.*nan"),
    "gamma text": (lambda: FocalLoss("2"), TypeError, "gamma.*'2'"),
    "alpha": (lambda: FocalLoss(alpha=1.5), ValueError, r"alpha.*\[0, 1\].*1.5"),
    "beta": (lambda: ClassBalancedLoss(COUNTS, 1.1), ValueError, "beta.*1.1"),
    "form": (lambda: ClassBalancedLoss(COUNTS, form="x"), ValueError, "form.*focal.*x"),
    "option": (lambda: ClassBalancedLoss(COUNTS, tau=1), TypeError, "tau"),
    "power": (lambda: ClassBalancedLoss(COUNTS, power=2), ValueError, "power.*2"),
    "power -1": (
        lambda: ClassWeightedLoss(ClassFrequency(COUNTS), power=-1),
        ValueError,
        "power.*-1",
    ),
    "form gamma": (
        lambda: ClassWeightedLoss([1.0], gamma=-1),
        ValueError,
        "gamma.*-1",
    ),
    "weight": (lambda: ClassWeightedLoss([1, -2.0]), ValueError, "weights.*-2"),
    "weight nan": (lambda: ClassWeightedLoss([math.nan]), ValueError, "weights.*nan"),
    "weights 2-D": (lambda: ClassWeightedLoss(Z), ValueError, r"weights.*\[2, 6\]"),
    "weights 0-D": (lambda: ClassWeightedLoss(1.0), ValueError, r"weights.*\[\]"),
    "no weights": (lambda: ClassWeightedLoss([]), ValueError, r"weights.*\[0\]"),
    "weights text": (lambda: ClassWeightedLoss("x"), TypeError, "weights.*'x'"),
    "empty class": (lambda: ClassBalancedLoss(HOLED), ValueError, "frequency.*first 1"),
    "empty prior": (lambda: BalancedSoftmaxLoss(HOLED), ValueError, "frequency.*0"),
    "empty margin": (lambda: LDAMLoss(HOLED), ValueError, "frequency.*0"),
    "empty inverse": (
        lambda: ClassWeightedLoss(ClassFrequency(HOLED)),
        ValueError,
        "frequency.*0",
    ),
    "shares": (lambda: LDAMLoss(torch.tensor([0.5])), ValueError, "frequency.*0.5"),
    "frequency text": (lambda: LDAMLoss("x"), TypeError, "frequency.*'x'"),
    "tau": (lambda: BalancedSoftmaxLoss(COUNTS, -1), ValueError, "tau.*-1"),
    "margin": (lambda: LDAMLoss(COUNTS, -1), ValueError, "max_margin.*-1"),
    "scale": (lambda: LDAMLoss(COUNTS, 0.5, math.inf), ValueError, "scale.*inf"),
    "ldam weights": (
        lambda: LDAMLoss(COUNTS, weights=[1.0]),
        ValueError,
        r"weights.*\[6\].*\[1\]",
    ),
    "classes 0": (lambda: EQLv2(0), ValueError, "num_classes.*0"),
    "seesaw counts": (
        lambda: seesaw_terms(torch.zeros(1, 6), torch.tensor([0]), torch.ones(7)),
        ValueError,
        r"counts.*\[7\]",
    ),
    "classes 2.5": (lambda: SeesawLoss(2.5), ValueError, "num_classes.*2.5"),
    "classes text": (lambda: EQLv2("5"), TypeError, "num_classes.*'5'"),
    "eqlv2 gamma": (lambda: EQLv2(C, -1), ValueError, "gamma.*-1"),
    "mu": (lambda: EQLv2(C, mu=math.nan), ValueError, "mu.*nan"),
    "eqlv2 alpha": (lambda: EQLv2(C, alpha=-1), ValueError, "alpha.*-1"),
    "p": (lambda: SeesawLoss(C, -1), ValueError, "p must.*-1"),
    "q": (lambda: SeesawLoss(C, q=-1), ValueError, "q must.*-1"),
    "floor": (lambda: SeesawLoss(C, floor=2), ValueError, "floor.*2"),
}


def test_one_class_is_enough():
    for loss in (EQLv2(1), SeesawLoss(1)):
        assert loss(torch.zeros(2, 1), torch.tensor([0, 0])).isfinite()


@pytest.mark.parametrize("case", MAKES)
def test_errors_of_a_loss_name_the_argument(case):
    make, kind, message = MAKES[case]
    with pytest.raises(kind, match=message):
        make()
