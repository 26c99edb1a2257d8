"""High dynamic range is converted to standard range by the standards' curves."""

import numpy as np
import pytest

from promag.data.video.tone_mapping import HLG, PEAK, PQ, WHITE, hlg_to_scene, light_to_pq, pq_to_light, roll_off, to_sdr


@pytest.mark.parametrize(("light", "signal"), [(0, 0), (100, 0.5081), (203, 0.5807), (1000, 0.7518), (10_000, 1)])
def test_pq_signals(light, signal):
    """The values are those of ITU-R BT.2408, table 1, and both ends of the range."""
    assert light_to_pq(np.array(light)) == pytest.approx(signal, abs=1e-4)
    assert pq_to_light(np.array(signal)) == pytest.approx(light, rel=2e-3, abs=1e-6)


@pytest.mark.parametrize(("signal", "scene"), [(0, 0), (0.5, 1 / 12), (1, 1), (0.75, 0.2650)])
def test_hlg_signals(signal, scene):
    assert hlg_to_scene(np.array(signal)) == pytest.approx(scene, abs=1e-4)


def test_hdr_reference_white_of_hlg_is_203():
    scene = hlg_to_scene(np.array(0.75))
    assert PEAK * scene**1.2 == pytest.approx(203, abs=1)


def test_dark_values_pass_and_bright_values_are_rolled_off():
    light = np.linspace(0, 1500, 3001)
    shown = roll_off(light)
    np.testing.assert_allclose(shown[light < 80], light[light < 80], rtol=1e-6)
    assert shown[-1] == pytest.approx(WHITE)
    assert (np.diff(shown[light <= 1000]) > 0).all()


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_greys_stay_grey_and_rise(transfer):
    ramp = np.repeat(np.linspace(0, 65535, 64).astype(np.uint16)[None, :, None], 3, axis=2)
    shown = to_sdr(ramp, transfer)[0].astype(int)
    assert np.ptp(shown, axis=1).max() <= 1
    assert (np.diff(shown[:, 0]) >= 0).all()
    assert (shown[0, 0], shown[-1, 0]) == (0, 255)


def test_a_grey_of_known_light():
    """26 cd/m2 on a display of 203 with gamma 2.4."""
    code = np.uint16(round(float(light_to_pq(np.array(26.0))) * 65535))
    assert to_sdr(np.full((1, 1, 3), code), PQ)[0, 0].tolist() == [round(255 * (26 / 203) ** (1 / 2.4))] * 3


def test_colours_outside_bt709_are_clipped_to_its_gamut():
    green = np.array([[[0, 40_000, 0]]], np.uint16)
    red, full, blue = to_sdr(green, PQ)[0, 0].tolist()
    assert (red, blue) == (0, 0)
    assert full > 200
