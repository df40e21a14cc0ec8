"""The compiled CPU kernels, number by number: exact integer sums, promised bounds, odd shapes, rows and threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import native
import pytest
import torch
from native import assert_close, cases, inputs_of, normal, one_thread, run, threads, weight  # noqa: F401 - a fixture

from autotune.errors import DeviceError, InputError
from autotune.kernels.cpu import decoder
from autotune.kernels.spec import GroupWeight, load
from autotune.search_space.schemes import scheme

pytestmark = pytest.mark.usefixtures("one_thread")
MOST_INPUTS = 2**16
ROWS = (*range(1, 20), 64, 129)


def _pruned(codes: torch.Tensor, name: str) -> torch.Tensor:
    """Two of every four codes zeroed where the scheme is 2:4: another two for every output and quad."""
    if scheme(name).sparsity == "2:4":
        kept = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]])
        quads = codes.view(codes.shape[0], -1, 4)
        chosen = (torch.arange(quads.shape[0])[:, None] + torch.arange(quads.shape[1])) % 6
        codes = (quads * kept[chosen].to(codes.dtype)).view(codes.shape)
    return codes


def _integer_weight(name: str, codes: torch.Tensor) -> GroupWeight:
    """Scales that are powers of two, other ones for every group and output."""
    groups = codes.shape[1] // (scheme(name).weight.group_size or codes.shape[1])
    exponents = (torch.arange(codes.shape[0])[:, None] + torch.arange(groups)) % 4 - 6.0
    return GroupWeight(name, codes=_pruned(codes, name), scales=torch.exp2(exponents))


def _integer_rows(count: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, x): each row holds 127.5 times a power of two, so that its scale is that power, and its codes known."""
    generator = torch.Generator().manual_seed(inputs)
    codes = torch.randint(-128, 128, (count, inputs), generator=generator)
    x = codes.float()
    codes[:, 0], x[:, 0] = 127, 127.5
    x[x == -128.0] = -127.5  # a tie: to even, -128
    return codes, x * torch.exp2(torch.arange(count) % 5 - 2.0)[:, None]


def _exact(made: GroupWeight, codes: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The sums in int64, scaled in float64, rounded once to fp32 and once to the dtype of x."""
    groups = made.scales.shape[1]
    parts = zip(codes.chunk(groups, 1), made.codes.long().chunk(groups, 1), made.scales.T.double(), strict=True)
    total = sum((x_codes @ w_codes.T).double() * scale for x_codes, w_codes, scale in parts)
    return (total * (x[:, :1].double() / 127.5)).float().to(x.dtype)


@pytest.mark.parametrize(("spec", "name", "dtype"), cases("integer", activations=True))
def test_integer_sums_are_exact(spec, name, dtype):
    lowest = -(2 ** (scheme(name).weight.bits - 1))  # one more than the schemes use: packers take it
    for inputs in (*inputs_of(name, 4, 36, 100), 4096, 14336):
        generator = torch.Generator().manual_seed(inputs)
        codes = torch.randint(lowest, -lowest, (33, inputs), dtype=torch.int8, generator=generator)
        made = _integer_weight(name, codes)
        x_codes, x = _integer_rows(11, inputs)
        packed = load(spec).pack(made, dtype)
        for rows in (1, 3, 11):
            y = load(spec).run(packed, x[:rows].to(dtype))
            assert torch.equal(y, _exact(made, x_codes[:rows], x[:rows].to(dtype))), (inputs, rows)


@pytest.mark.parametrize(("spec", "name", "dtype"), cases("integer", activations=True))
def test_the_largest_sums_do_not_overflow(spec, name, dtype):
    """Every product at its extreme, up to the most inputs that are accepted: one block, half of it of either sign."""
    lowest = -(2 ** (scheme(name).weight.bits - 1))
    for inputs, low in ((14336, lowest), (MOST_INPUTS, lowest + 1), (MOST_INPUTS, lowest)):
        codes = torch.full((16, inputs), low, dtype=torch.int8)
        codes[::2] = -1 - lowest
        made = _integer_weight(name, codes)
        made.scales.fill_(2.0**-6)  # equal, so that fp32 holds the sum over groups exactly
        x_codes = torch.tensor([[127], [-128], [127], [-128], [127]]).repeat(1, inputs)
        x = torch.where(x_codes > 0, 127.5, -127.5) * 2.0**-3
        packed = load(spec).pack(made, dtype)
        expected = _exact(made, x_codes, x.abs().to(dtype))
        assert float(expected.float().abs().min()) > 0.0
        for rows in (1, 2, 5):
            assert torch.equal(load(spec).run(packed, x[:rows].to(dtype)), expected[:rows]), (inputs, rows)


def test_more_inputs_than_sums_can_hold_are_refused():
    made = GroupWeight("w8a8-int8", codes=torch.zeros(1, MOST_INPUTS + 1, dtype=torch.int8), scales=torch.ones(1, 1))
    spec = next(spec for spec in native.SPECS if "w8a8-int8" in spec.schemes)
    with pytest.raises(InputError, match=r"kernel\.limit"):
        load(spec).pack(made, torch.float32)


@pytest.mark.parametrize(("spec", "name", "dtype"), cases("integer", activations=False))
def test_planes_hold_every_code(spec, name, dtype):
    """Weights that pass one input through give it back: exactly in fp32 (24 bits), but for small ones in bf16 (16)."""
    inputs = inputs_of(name, 96)[0]
    codes = torch.eye(inputs, dtype=torch.int8)
    codes[1::2] *= -1
    groups = inputs // (scheme(name).weight.group_size or inputs)
    made = GroupWeight(name, codes=codes, scales=torch.ones(inputs, groups))
    generator = torch.Generator().manual_seed(1)
    most = 8355711 if dtype == torch.float32 else 2**15 - 128
    x = torch.randint(-most, most + 1, (9, inputs), generator=generator).to(dtype)
    x[:, 0], x[:, -1], x[0, 1:3] = most, -most, torch.tensor([128.0, -129.0])
    y = run(spec, made, x) * codes.diagonal()
    kept = x.abs() >= (0.0 if dtype == torch.float32 else most * 2.0**-6)
    assert torch.equal(y[kept], x[kept])
    assert int(kept.sum()) > 0.9 * x.numel()
    assert_close(y * codes.diagonal(), made, x)


@pytest.mark.parametrize(("spec", "name", "dtype"), cases())
def test_an_outlier_costs_no_more_than_promised(spec, name, dtype):
    for inputs in (inputs_of(name, 100)[0], 14336):
        made = weight(name, 48, inputs, dtype)
        x = normal(19, inputs, dtype)
        x[:, 5] *= 1000.0
        x[3:7] = x[3:7].abs()  # all of one sign: nothing cancels
        assert_close(run(spec, made, x), made, x)


@pytest.mark.parametrize(("spec", "name", "dtype"), cases())
def test_nan_and_infinity_stay_in_their_row(spec, name, dtype):
    inputs = inputs_of(name, 100)[0]
    made = weight(name, 33, inputs, dtype)
    x = normal(11, inputs, dtype)
    clean = run(spec, made, x)
    for row, value in ((0, float("nan")), (4, float("inf")), (10, -float("inf"))):
        poisoned = x.clone()
        poisoned[row, -4:] = value  # a whole quad: a 2:4 kernel reads two of its inputs, whichever they are
        y = run(spec, made, poisoned)
        assert not bool(torch.isfinite(y[row]).any())
        y[row] = clean[row]
        assert torch.equal(y, clean)
        alone = run(spec, made, poisoned[row : row + 1])
        assert not bool(torch.isfinite(alone).any())


@pytest.mark.parametrize(("spec", "name", "dtype"), cases())
def test_rows_of_zeros_give_the_bias(spec, name, dtype):
    for inputs in inputs_of(name, 33, 100):
        for bias in (True, False):
            made = weight(name, 33, inputs, dtype, bias)
            expected = made.bias if bias else torch.zeros(33, dtype=dtype)
            for rows in (1, 3, 8):
                x = torch.zeros(rows, inputs, dtype=dtype)
                assert torch.equal(run(spec, made, x), expected.expand(rows, -1))
                assert torch.equal(run(spec, made, -x), expected.expand(rows, -1))


@pytest.mark.parametrize(("spec", "name", "dtype"), cases())
def test_tiny_and_huge_inputs(spec, name, dtype):
    """Subnormal tokens may count as zeros; huge ones must not overflow before their sums do."""
    inputs = inputs_of(name, 100)[0]
    made = weight(name, 17, inputs, dtype, bias=False)
    x = normal(5, inputs, dtype).float()
    x = (x * torch.tensor([1e-39, 1e-37, 1e-20, 1e30, 1e36])[:, None]).to(dtype)
    y = run(spec, made, x)
    assert 0.0 < float(x[0].abs().max()) < 2.0**-126
    assert float(y[:2].abs().max()) < 1e-35
    assert_close(y[2:], made, x[2:])


@pytest.mark.parametrize(("spec", "name", "dtype"), cases())
def test_odd_shapes_and_every_number_of_rows(spec, name, dtype):
    for outputs in (1, 15, 16, 17, 33):
        for inputs in inputs_of(name, 1, 4, 31, 32, 33, 100):
            made = weight(name, outputs, inputs, dtype, bias=(outputs + inputs) % 2 == 0)
            packed = load(spec).pack(made, dtype)
            x = normal(ROWS[-1], inputs, dtype, seed=outputs)
            y = load(spec).run(packed, x)
            assert_close(y, made, x)
            for rows in ROWS:
                part = load(spec).run(packed, x[:rows])
                assert part.shape == (rows, outputs)
                if native.family(spec) == "integer":
                    assert torch.equal(part, y[:rows]), (outputs, inputs, rows)
                else:
                    assert_close(part, made, x[:rows])


@pytest.mark.parametrize(("spec", "name", "dtype"), cases())
def test_more_rows_than_the_cache_holds(spec, name, dtype):
    """With so many inputs, rows go through the weights in several passes."""
    inputs = 16384
    made = weight(name, 33, inputs, dtype)
    packed = load(spec).pack(made, dtype)
    x = normal(43, inputs, dtype)
    y = load(spec).run(packed, x)
    assert_close(y, made, x)
    with threads(2):
        assert torch.equal(load(spec).run(packed, x), y)


@pytest.mark.parametrize(("spec", "name", "dtype"), cases("integer"))
def test_a_row_does_not_see_the_others(spec, name, dtype):
    """Bit for bit, so that a batch answers as each of its members would. (bf16 sums depend on the rows at hand.)"""
    inputs = inputs_of(name, 100)[0]
    made = weight(name, 40, inputs, dtype)
    packed = load(spec).pack(made, dtype)
    x = normal(23, inputs, dtype)
    y = load(spec).run(packed, x)
    for row in range(23):
        assert torch.equal(load(spec).run(packed, x[row : row + 1])[0], y[row])
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load(spec).run(packed, x[order]), y[order])


@pytest.mark.parametrize(("spec", "name", "dtype"), cases())
def test_threads_do_not_change_a_bit(spec, name, dtype):
    inputs = inputs_of(name, 100)[0]
    for outputs in (17, 100):
        made = weight(name, outputs, inputs, dtype)
        packed = load(spec).pack(made, dtype)
        for rows in (1, 3, 65):
            x = normal(rows, inputs, dtype)
            alone = load(spec).run(packed, x)
            for count in (2, 3, 4):
                with threads(count):
                    assert torch.equal(load(spec).run(packed, x), alone), (outputs, rows, count)


@pytest.mark.parametrize(("spec", "name", "dtype"), cases())
def test_callers_do_not_share_buffers(spec, name, dtype):
    """Calls release Python's lock: two of them, of different layers, run at the same time."""
    inputs = inputs_of(name, 100)[0]
    packed = [load(spec).pack(weight(name, 64, inputs, dtype, seed=seed), dtype) for seed in (0, 1)]
    work = [(layer, normal(9, inputs, dtype, seed)) for seed, layer in enumerate(packed)]
    alone = [load(spec).run(*item) for item in work]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda i: load(spec).run(*work[i % 2]), range(40)))
    assert all(torch.equal(y, alone[i % 2]) for i, y in enumerate(together))


@pytest.mark.parametrize(("spec", "name", "dtype"), cases())
def test_no_rows_at_all(spec, name, dtype):
    """In a thread of its own, which has no memory left from calls before."""
    made = weight(name, 33, inputs_of(name, 100)[0], dtype)
    packed = load(spec).pack(made, dtype)
    with ThreadPoolExecutor(1) as pool:
        y = pool.submit(load(spec).run, packed, torch.empty(0, packed.in_features, dtype=dtype)).result()
    assert y.shape == (0, 33)
    assert y.dtype == dtype


@pytest.mark.parametrize(("spec", "name", "dtype"), cases())
def test_activations_elsewhere_are_refused(spec, name, dtype):
    """As of a model that was moved to a card: their address means nothing here."""
    packed = load(spec).pack(weight(name, 33, inputs_of(name, 100)[0], dtype), dtype)
    with pytest.raises(DeviceError, match=r"kernel\.device.* on meta"):
        load(spec).run(packed, torch.empty(2, packed.in_features, dtype=dtype, device="meta"))


@pytest.mark.parametrize(("spec", "name", "dtype"), cases("integer"))
def test_products_in_one_native_call(spec, name, dtype):
    """One after the other into the same outputs: the last one's stay, whichever that is."""
    inputs = inputs_of(name, 100)[0]
    module, x = load(spec), normal(3, inputs, dtype)
    packed = [module.pack(weight(name, 33, inputs, dtype, seed=seed), dtype) for seed in (0, 1)]
    products = [decoder.native_product(module.native(item), 33) for item in packed]
    for order in ((0, 1), (1, 0), (1,)):
        y = torch.full((3, 33), torch.nan, dtype=dtype)
        decoder.multiply([products[i] for i in order], x, y, 1)()
        assert torch.equal(y, module.run(packed[order[-1]], x))
