"""The kernels of `in_triton` without a GPU; `test_in_triton.py` runs this file.

TRITON_INTERPRET=1 pytest tests/in_interpreter.py: their numbers, on the CPU.
python tests/in_interpreter.py: that each launch compiles for cards, without spills.
"""

import subprocess
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton

from eql_repro import in_triton, kernels
from eql_repro.in_triton import eql_rows, seql_rows, times_

torch.set_num_threads(1)
SHAPES = [(n, c) for c in (1, 3, 30, 1230) for n in (1, 5)] + [(2, 21841)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LOSS = {torch.float64: 1e-12}  # relative, for a row; else float32, below
GRAD = {torch.float32: 3e-6, torch.float64: 1e-12}
GRAD |= {torch.bfloat16: 2**-7, torch.float16: 2**-10}  # interpreted: bf16 cuts off


def eql_terms(z, target, tail, e):
    """Terms and their derivatives in float64, from the formulas."""
    z, tail, e = z.double(), tail.double(), e.double()
    own = target[:, None] == torch.arange(z.shape[1])
    w = torch.where(own, 1, 1 - e[:, None] * tail)
    x = torch.where(own, -z, z)
    softplus = x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))
    return w * softplus, w * torch.sigmoid(x) * torch.where(own, -1, 1)


def seql_terms(z, target, ignored):
    """Losses and their derivatives in float64, from the formulas."""
    z = z.double().masked_fill(ignored, -torch.inf)
    p = z.softmax(1) - F.one_hot(target, z.shape[1])
    return F.cross_entropy(z, target, reduction="none"), p


def assert_near(got, want, relative, absolute=0.0):
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=relative, atol=absolute)


def least(dtype):
    """Where the type has no full precision any more."""
    return 1e-37 if dtype == torch.float32 else 2 * torch.finfo(dtype).smallest_normal


def logits(n, c, dtype, spread=8.0):
    z = torch.randn(n, c, generator=torch.Generator().manual_seed(n + c)) * spread
    return z.to(dtype)


def labels(n, c, low=-2, high=2):
    """Labels of which many are outside [0, C)."""
    some = torch.Generator().manual_seed(n * c)
    return torch.randint(low, c + high, (n,), generator=some)


def tails(n, c):
    """A tail of each kind."""
    some = torch.Generator().manual_seed(n - c)
    each, rows = (torch.rand(*s, generator=some) for s in ((c,), (n, c)))
    yield from (each < 0.5, each, each.double(), rows < 0.5, rows)
    yield (rows < 0.5)[:1].expand(n, c)


@pytest.mark.parametrize("n, c", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_eql(n, c, dtype):
    z, target = logits(n, c, dtype), labels(n, c)
    inside = (target >= 0) & (target < c)
    kinds = list(tails(n, c)) if n * c < 10**4 else list(tails(n, c))[:1]
    for tail, e in product(kinds, (inside, torch.ones(n, dtype=torch.int64))):
        partial, dz = eql_rows(z, target, tail, e, 1 / 3)
        loss, d = eql_terms(z, target, tail, e)
        assert dz.dtype == dtype and dz.is_contiguous()
        assert_near(partial, loss.sum(1), LOSS.get(dtype, 2e-6), 1e-30)
        assert_near(dz, d / 3, GRAD[dtype], least(dtype))


@pytest.mark.parametrize("block, warps", [(32, 1), (64, 1), (256, 4), (4096, 4)])
def test_block_sizes(block, warps, monkeypatch):
    monkeypatch.setattr(
        in_triton, "_eql_sizes", lambda c: in_triton._sizes(block, warps)
    )
    monkeypatch.setattr(
        in_triton, "_seql_sizes", lambda c: in_triton._sizes(block, warps)
    )
    for c in (1, 32, 33, 500):
        test_eql(5, c, torch.float32)
        test_seql_given(5, c, torch.float32)
        if block == 32:
            test_seql_draw_is_philox(5, c)


@pytest.mark.parametrize("fill", ["eql", "seql"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_apart(fill, dtype):
    n, c = 6, 30
    wide, target = logits(n, 2 * c + 7, dtype), labels(n, c, 0, 0)
    tail = torch.rand(n, 2 * c + 7) < 0.5
    for k in (1, 2):
        z, t = wide[:, 3 : 3 + k * c : k], tail[:, 1 : 1 + k * c : k]
        t[torch.arange(n), target] = False
        if fill == "eql":
            rest, terms = (torch.ones(2 * n).long()[::2],), eql_terms
            got = eql_rows(z, target.repeat_interleave(2)[::2], t, *rest, 0.5)
        else:
            rest, terms = (), seql_terms
            got = seql_rows(z, target, t, None, 1.0, 0.5)
        loss, d = terms(z, target, t, *rest)
        loss = loss.sum(1) if fill == "eql" else loss
        assert_near(got[0], loss, LOSS.get(dtype, 2e-6), 1e-6)
        assert_near(got[1], d / 2, GRAD[dtype], 1e-6)
        assert got[1].is_contiguous()


def test_far_rows():
    step = 2**31 + 16
    try:
        room = torch.empty(step + 64, dtype=torch.float16)  # pages stay untouched
    except RuntimeError:
        pytest.skip("no address space")
    z, target = room.as_strided((2, 30), (step, 1)), torch.tensor([3, 4])
    z.copy_(logits(2, 30, torch.float16))
    none = torch.zeros(30, dtype=torch.bool)
    loss, d = eql_terms(z, target, none, target)
    assert_near(eql_rows(z, target, none, target, 1.0)[0], loss.sum(1), 1e-6)
    loss, d = seql_terms(z, target, none)
    assert_near(seql_rows(z, target, none, None, 1.0, 1.0)[0], loss, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_eql_small_terms_keep_their_precision(dtype):
    """A row with one class: the sum is the term; float32 exp is exact to ~1e-6."""
    z = torch.cat([-torch.logspace(-6, 1.9, 200), torch.logspace(-6, 1.9, 200)])
    z = torch.cat([z, torch.tensor([-20.0, 20.0, 0.0, -0.0])]).to(dtype)[:, None]
    tail = torch.zeros(1)
    for label in (0, 1):
        target = torch.full((len(z),), label)
        partial, dz = eql_rows(z, target, tail, target == 0, 1.0)
        loss, d = eql_terms(z, target, tail, target == 0)
        assert_near(partial, loss.sum(1), LOSS.get(dtype, 3e-6))
        assert_near(dz, d, GRAD[dtype], least(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_eql_extreme(dtype):
    huge = [1e4, -1e4, 6e4, -6e4, 88.0, -104.0, 700.0, -745.0]
    z = torch.tensor([huge, huge[::-1]], dtype=torch.float64).to(dtype)
    for tail in (torch.zeros(8), torch.ones(8), torch.arange(8) / 8):
        for label in (0, 1, 8):
            target = torch.tensor([label, 7 - label])
            loss, d = eql_terms(z, target, tail, torch.ones(2))
            partial, dz = eql_rows(z, target, tail, torch.ones(2), 1.0)
            assert partial.isfinite().all() and dz.isfinite().all()
            assert_near(partial, loss.sum(1), LOSS.get(dtype, 2e-6), 1e-30)
            assert_near(dz, d, 2e-5 if dtype.itemsize == 4 else GRAD[dtype], 1e-7)


def test_infinite_logits_and_nan():
    z = torch.tensor([[-torch.inf, 1.0, torch.nan], [-torch.inf, 1.0, 2.0]])
    target, tail = torch.tensor([1, 1]), torch.zeros(3, dtype=torch.bool)
    partial, dz = eql_rows(z, target, tail, target, 1.0)
    assert partial.isnan().tolist() == [True, False]
    assert dz.isnan().nonzero().tolist() == [[0, 2]]
    assert dz[:, 0].tolist() == [0, 0]
    partial, dz = seql_rows(z, target, tail, None, 0.0, 1.0)
    assert partial.isnan().tolist() == [True, False] and dz[0].isnan().all()
    assert_near(dz[1:], seql_terms(z[1:], target[1:], tail)[1], 1e-6)
    wide = torch.full((1, 5000), -torch.inf)  # whole blocks of -inf
    wide[0, 4500] = 3.0
    own, tail = torch.tensor([4500]), torch.zeros(5000, dtype=torch.bool)
    partial, dz = seql_rows(wide, own, tail, None, 0.0, 1.0)
    assert partial.item() == 0 and (dz == 0).all()


def ignored_by_hand(n, c, target):
    some = torch.Generator().manual_seed(c)
    ignored = torch.rand(n, c, generator=some) < 0.6
    return ignored.scatter_(1, target[:, None], False)


@pytest.mark.parametrize("n, c", [*SHAPES, (2, 65536)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_seql_given(n, c, dtype):
    z, target = logits(n, c, dtype), labels(n, c, 0, 0)
    ignored = ignored_by_hand(n, c, target)
    partial, dz = seql_rows(z, target, ignored, None, 1.0, 1 / 3)
    loss, d = seql_terms(z, target, ignored)
    small = 1e-15 if dtype == torch.float64 else 2e-6
    assert_near(partial, loss, LOSS.get(dtype, 2e-6), small)
    absolute = 1e-16 if dtype == torch.float64 else 1e-7
    assert_near(dz, d / 3, max(GRAD[dtype], 1e-12), absolute)
    assert (dz[ignored] == 0).all() and dz.is_contiguous() and dz.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_as_the_sums_of_the_project(dtype):
    n, c = 20, 1230
    target, z = labels(n, c, 0, 0), logits(n, c, dtype).requires_grad_()
    ignored, tail = ignored_by_hand(n, c, target), torch.rand(c) < 0.5
    want = kernels.seql_sum(z, target, ignored, scale=0.25)
    (d,) = torch.autograd.grad(want, z)
    partial, dz = seql_rows(z.detach(), target, ignored, None, 1.0, 0.25)
    assert_near(partial.sum() / 4, want.double(), 1e-6)
    assert_near(dz, d.double(), 2e-5, 1e-7)
    for t in (tail, tail.to(dtype) / 3):
        target = labels(n, c)
        want = kernels.eql_sum(z, target, t, scale=0.25)
        (d,) = torch.autograd.grad(want, z)
        inside = (target >= 0) & (target < c)
        partial, dz = eql_rows(z.detach(), target, t, inside, 0.25)
        assert_near(partial.sum() / 4, want.double(), 1e-6)
        assert_near(dz, d.double(), 2e-5, 1e-7)


def philox(seed, counter, row):
    """The four words of Philox 4x32-10 for each counter, uint32 [len(counter), 4]."""
    low = np.uint64(2**32 - 1)
    c = [np.broadcast_to(np.uint64(v), counter.shape) for v in (0, row, 0, 0)]
    c[0], k = counter.astype(np.uint64), [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high = [x >> np.uint64(32) for x in (b, a)]
        mixed = zip(high, c[1::2], k, strict=True)
        c[0], c[2] = (h ^ x ^ np.uint64(s) for h, x, s in mixed)
        c[1], c[3] = b & low, a & low
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return np.stack(c, 1)


@pytest.mark.parametrize("n, c", [(5, 3), (4, 30), (3, 1230), (2, 21841)])
def test_seql_draw_is_philox(n, c, gamma=0.7):
    seed = 2**62 + 12345678901
    z, target = torch.zeros(n, c), labels(n, c, 0, 0)
    tail = torch.rand(c, generator=torch.Generator().manual_seed(1)) < 0.6
    _, dz = seql_rows(z, target, tail, torch.tensor([seed]), gamma, 1.0)
    groups = np.arange((c + 3) // 4)
    words = np.stack([philox(seed, groups, row).ravel()[:c] for row in range(n)])
    beta = torch.from_numpy((words >> np.uint64(8)) < int(gamma * 2**24))
    ignored = (beta & tail).scatter_(1, target[:, None], False)
    rivals = target[:, None] != torch.arange(c)
    assert ((dz == 0) == ignored)[rivals].all()
    assert_near(dz, seql_terms(z, target, ignored)[1], 2e-6, 1e-7)


def test_philox_by_hand():
    """Known answers of the generator's authors (Random123, kat_vectors)."""
    assert philox(0, np.array([0]), 0)[0].tolist() == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]


def test_seql_draw():
    n, c = 32, 2500
    z, target = logits(n, c, torch.float32, 1.0), labels(n, c, 0, 0)
    tail = torch.arange(c) % 2 == 0
    for gamma in (0.0, 0.1, 0.5, 0.95, 1.0):
        seeds = [torch.tensor(s) for s in (1, 1, 2, 1 + 2**32)]
        draws = [seql_rows(z, target, tail, s, gamma, 1.0) for s in seeds]
        first, same, *others = [dz == 0 for _, dz in draws]
        assert (first == same).all() and (draws[0][0] == draws[1][0]).all()
        rivals = tail.expand(n, c).scatter(1, target[:, None], False)
        assert not first[~rivals].any()
        share, m = first[rivals].double().mean(), rivals.sum()
        assert abs(share - gamma) <= 5 * (gamma * (1 - gamma) / m) ** 0.5
        if 0 < gamma < 1:
            pairs = [(first[:, ::2], x[:, ::2]) for x in others]
            pairs += [(first[1:, ::2], first[:-1, ::2])]  # rows
            pairs += [(first[:, 2::2], first[:, :-2:2])]  # neighbours
            for a, b in pairs:
                corr = np.corrcoef(a.ravel().numpy(), b.ravel().numpy())[0, 1]
                assert abs(corr) < 5 / len(a.ravel()) ** 0.5
        loss, d = seql_terms(z, target, first & rivals)
        assert_near(draws[0][0], loss, 2e-6)
        assert_near(draws[0][1], d, 3e-6, 1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_seql_extreme(dtype):
    z = torch.tensor([[1e4, -1e4, 6e4, -6e4], [-6e4, -6e4, -6e4, -1e4]]).to(dtype)
    for a, b in product(range(4), range(4)):
        target = torch.tensor([a, b])
        ignored = torch.tensor([False, False, True, False]).repeat(2, 1)
        ignored[torch.arange(2), target] = False
        partial, dz = seql_rows(z, target, ignored, None, 1.0, 1.0)
        loss, d = seql_terms(z, target, ignored)
        assert partial.isfinite().all()
        assert_near(partial, loss, LOSS.get(dtype, 1e-6), 1e-30)
        assert_near(dz, d, GRAD[dtype], 1e-30)


def test_seql_label_outside():
    z, tail = torch.randn(3, 5), torch.zeros(5, dtype=torch.bool)
    partial, _ = seql_rows(z, torch.tensor([0, 5, -1]), tail, None, 1.0, 1.0)
    assert partial.isnan().tolist() == [False, True, True]


def test_no_rows():
    z, none, tail = torch.empty(0, 7), torch.empty(0).long(), torch.zeros(7)
    assert [x.shape for x in eql_rows(z, none, tail, none, 1.0)] == [(0,), (0, 7)]
    got = seql_rows(z, none, tail.bool(), torch.tensor(1), 0.5, 1.0)
    assert [x.shape for x in got] == [(0,), (0, 7)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", [1.0, 0.0, -3.5, float("nan")])
def test_times(dtype, grad):
    x = logits(5, 1230, dtype)
    want = x * torch.tensor(grad)
    number = torch.tensor(grad, dtype=torch.float32)
    assert times_(x, number) is x
    torch.testing.assert_close(x, want, equal_nan=True)


# For real cards, without one


def resources(cubin):
    """What a compiled kernel uses: REG, STACK (spills), SHARED, LOCAL."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
    pairs = [x.split(":") for x in out.stdout.split() if x.count(":") == 1]
    return {k: int(v) for k, v in pairs if k in ("REG", "STACK", "SHARED", "LOCAL")}


class Card:
    """Stands in for the driver: names a card, so that a launch compiles for it."""

    launcher_cls = None

    def __init__(self, arch):
        from triton.backends.compiler import GPUTarget

        self.get_current_target = lambda: GPUTarget("cuda", arch, 32)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


def launched(arch):
    """Call the functions on CPU tensors; return what each launch would have run."""
    triton.runtime.driver.set_active(Card(arch))
    kernels, run = [], triton.runtime.jit.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    triton.runtime.jit.JITFunction.run = compile_only
    try:
        for dtype, (n, c) in product(DTYPES, ((5, 30), (64, 1230), (8, 21841))):
            z, target = torch.zeros(n, c, dtype=dtype), torch.zeros(n).long()
            rows, one = torch.zeros(n, c, dtype=torch.bool), torch.ones(())
            for tail in (rows[0], rows, rows.float()):
                eql_rows(z, target, tail, target == 0, 1 / n)
            eql_rows(z[:, 1:], target, rows[0, 1:], target)
            seql_rows(z, target, rows[0], one.long(), 0.9, 1 / n)
            seql_rows(z, target, rows)
            times_(z, one)
    finally:
        triton.runtime.jit.JITFunction.run = run
    return kernels


def main():
    """Compile for both kinds of card; raise where registers spill."""
    for arch in (80, 90):
        kernels = launched(arch)
        used = [resources(kernel.asm["cubin"]) for kernel in kernels]
        spills = sum(x["LOCAL"] + x["STACK"] for x in used)
        registers = max(x["REG"] for x in used)
        print(f"sm_{arch}: {len(kernels)} launches, {registers} registers at most")
        assert len(kernels) > 50 and not spills
        narrow = [k for k in kernels if "bf16" in k.asm["ptx"]]
        assert all("cvt.rn.bf16" in k.asm["ptx"] for k in narrow)  # rounds


if __name__ == "__main__":
    main()
