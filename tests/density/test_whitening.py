import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentprior import InvalidLatentsError
from latentprior.density.whitening import Whitening, _oas_intensity

KINDS = ("full", "diagonal", "none")


@pytest.fixture
def rows(generator: torch.Generator) -> Tensor:
    z = torch.randn(500, 4, generator=generator, dtype=torch.float64)
    z[:, 1] = 3 * z[:, 0] + 0.1 * z[:, 1] + 100
    z[:, 2] = 1e-3 * z[:, 2].exp()
    return z


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[1] * 5 + [495], [500], [0, 3, 497], [250, 250, 0]])
def test_streamed_equals_direct(rows: Tensor, kind: str, sizes: list[int]) -> None:
    streamed = Whitening.fit(iter(rows.split(sizes)), kind)
    direct = Whitening.fit([rows], kind)
    for name, value in direct.state_dict().items():
        torch.testing.assert_close(streamed.state_dict()[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_and_determinant(rows: Tensor, kind: str, dtype: torch.dtype) -> None:
    whitening = Whitening.fit([rows], kind).to(dtype=dtype)
    z = rows.to(dtype)
    u = whitening.whiten(z)
    assert u.dtype == dtype
    scale = rows.std(0) + rows.mean(0).abs()
    error = ((whitening.unwhiten(u) - z).double() / scale).abs().max()
    assert error < (1e-11 if dtype == torch.float64 else 1e-4)
    sign, log_abs_det = torch.linalg.slogdet(whitening.matrix.double())
    assert sign == 1
    assert float(whitening.log_abs_det) == pytest.approx(float(log_abs_det), rel=1e-5)


def test_full_is_the_symmetric_root_of_the_shrunk_correlation(rows: Tensor) -> None:
    whitening = Whitening.fit([rows], "full")
    correlation = torch.corrcoef(rows.T)
    rho = _oas_intensity(correlation, len(rows))
    shrunk = (1 - rho) * correlation + rho * torch.eye(4, dtype=torch.float64)
    scaled = whitening.matrix * rows.std(0, correction=0)
    torch.testing.assert_close(scaled, scaled.T)
    torch.testing.assert_close(scaled @ shrunk @ scaled, torch.eye(4, dtype=torch.float64), atol=1e-9, rtol=0)


def test_whitened_rows_have_mean_zero_and_nearly_unit_covariance(rows: Tensor) -> None:
    u = Whitening.fit([rows], "full").whiten(rows)
    assert u.mean(0).abs().max() < 1e-9
    # Shrinkage leaves each eigenvalue at lambda / ((1 - rho) lambda + rho) of 1.
    values = torch.linalg.eigvalsh(torch.cov(u.T, correction=0))
    correlation = torch.corrcoef(rows.T)
    rho = _oas_intensity(correlation, len(rows))
    raw = torch.linalg.eigvalsh(correlation)
    torch.testing.assert_close(
        values.sort().values, (raw / ((1 - rho) * raw + rho)).sort().values, rtol=1e-6, atol=1e-9
    )


def test_diagonal_divides_by_standard_deviations(rows: Tensor) -> None:
    u = Whitening.fit([rows], "diagonal").whiten(rows)
    torch.testing.assert_close(u.std(0, correction=0), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(torch.corrcoef(u.T), torch.corrcoef(rows.T))


def test_none_is_the_identity(rows: Tensor) -> None:
    whitening = Whitening.fit([rows], "none")
    assert torch.equal(whitening.whiten(rows), rows)
    assert float(whitening.log_abs_det) == 0


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_change_of_units_changes_the_determinant_only(rows: Tensor, kind: str) -> None:
    factor = torch.tensor([1e-6, -2.0, 1e5, 7.0], dtype=torch.float64)
    shift = torch.tensor([5.0, 0.0, -1e3, 2.0], dtype=torch.float64)
    a, b = Whitening.fit([rows], kind), Whitening.fit([rows * factor + shift], kind)
    torch.testing.assert_close(
        b.whiten(rows * factor + shift).abs(), (a.whiten(rows) * factor.sign()).abs(), rtol=1e-6, atol=1e-6
    )
    assert float(b.log_abs_det) == pytest.approx(float(a.log_abs_det - factor.abs().log().sum()), abs=1e-6)


def test_intensity_is_that_of_the_paper(generator: torch.Generator) -> None:
    # Chen, Wiesel, Eldar and Hero (2010), eq. 23, written out with traces.
    x = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    s = torch.corrcoef(x.T)
    n, p = 30, 5
    square, trace = float((s @ s).trace()), float(s.trace())
    expected = ((1 - 2 / p) * square + trace**2) / ((n + 1 - 2 / p) * (square - trace**2 / p))
    assert _oas_intensity(s, n) == pytest.approx(min(1, expected))
    assert _oas_intensity(torch.eye(3, dtype=torch.float64), 10) == 1
    assert _oas_intensity(torch.eye(1, dtype=torch.float64), 10) == 0


@pytest.mark.parametrize("shape", [(2, 2), (3, 50), (20, 20)])
def test_fewer_rows_than_coordinates_stay_invertible(generator: torch.Generator, shape: tuple[int, int]) -> None:
    z = torch.randn(*shape, generator=generator, dtype=torch.float64)
    whitening = Whitening.fit([z], "full")
    torch.testing.assert_close(whitening.unwhiten(whitening.whiten(z)), z, atol=1e-6, rtol=1e-6)
    assert torch.isfinite(whitening.log_abs_det)


def test_duplicate_coordinates_stay_invertible(generator: torch.Generator) -> None:
    z = torch.randn(10_000, 1, generator=generator).repeat(1, 3)
    whitening = Whitening.fit([z], "full").float()
    torch.testing.assert_close(whitening.unwhiten(whitening.whiten(z)), z, atol=1e-3, rtol=1e-3)


def test_input_errors() -> None:
    with pytest.raises(InvalidLatentsError, match="at least 2 rows to standardise latents, got 0"):
        Whitening.fit([])
    with pytest.raises(InvalidLatentsError, match="got 1"):
        Whitening.fit([torch.ones(1, 2)])
    z = torch.arange(12.0).reshape(6, 2)
    z[:, 1] = 3.25
    with pytest.raises(InvalidLatentsError, match=r"constant latent coordinate\(s\) 1 have no density"):
        Whitening.fit([z])
    with pytest.raises(InvalidLatentsError, match=r"0, 1, 2, 3, 4, \.\.\."):
        Whitening.fit([torch.ones(4, 9)])
    with pytest.raises(InvalidLatentsError, match="overflow"):
        Whitening.fit([torch.tensor([[1e200], [-1e200]], dtype=torch.float64)])
    with pytest.raises(InvalidLatentsError, match="overflow"):
        Whitening.fit([torch.tensor([[1.0], [torch.nan]])])
    assert Whitening.fit([torch.ones(4, 2)], "none").kind == "none"


def test_constant_up_to_rounding_is_constant() -> None:
    z = torch.full((100, 1), 0.1, dtype=torch.float64)
    z[::2] += 1e-17
    with pytest.raises(InvalidLatentsError, match="constant"):
        Whitening.fit([z])


def test_state_round_trip(rows: Tensor) -> None:
    a = Whitening.fit([rows], "full").float()
    b = Whitening.from_state(a.state_dict(), "full")
    assert b.kind == "full"
    assert torch.equal(a.whiten(rows.float()), b.whiten(rows.float()))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    arrays.arrays(np.float64, st.tuples(st.integers(2, 8), st.integers(1, 4)), elements=st.floats(-1e6, 1e6, width=32)),
    st.sampled_from(KINDS),
)
def test_any_rows_round_trip_or_are_refused(values: np.ndarray, kind: str) -> None:
    z = torch.from_numpy(values)
    try:
        whitening = Whitening.fit([z], kind)
    except InvalidLatentsError:
        spread = z.std(0, correction=0)
        assert (spread <= 1e-9 * z.abs().amax(0) + 1e-300).any()
        return
    u = whitening.whiten(z)
    assert torch.isfinite(u).all()
    assert ((whitening.unwhiten(u) - z).abs() <= 1e-6 * (z.abs().amax(0) + 1e-30)).all()
