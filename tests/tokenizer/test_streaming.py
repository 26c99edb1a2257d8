import contextlib
import gc
import re

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from hypothesis import given, settings
from hypothesis import strategies as st

from promag.tokenizer.growth import CrossLevelAttention, Growth
from promag.tokenizer.layers import START, ResBlock
from promag.tokenizer.streaming import Padding, chunk_plan, crop_clip, pad_clip, reconstruct, reconstruct_stream
from promag.tokenizer.tiling import PartStates, Tiling, in_parts, tile_starts
from tests.conftest import SHORT, TINY, make_tokenizer
from tests.tokenizer.test_autoencoder import check_chunks_equal_the_whole

RATIOS = (4, 8, 16)


@given(st.integers(1, 70), st.integers(1, 20), st.integers(1, 20), st.sampled_from(RATIOS))
def test_padding_repeats_the_end_and_is_removed_again(frames, height, width, ratio):
    x = torch.rand(1, 1, frames, height, width)
    padded, padding = pad_clip(x, ratio)
    assert (padded.shape[2] - 1) % ratio == padded.shape[3] % 8 == padded.shape[4] % 8 == 0
    assert (padding.frames, padding.rows, padding.columns) < (ratio, 8, 8)
    assert torch.equal(crop_clip(padded, padding), x)
    assert torch.equal(padded[:, :, frames - 1 :, :height, :width], x[:, :, -1:].expand(-1, -1, padding.frames + 1, -1, -1))


@given(st.integers(0, 40), st.sampled_from(RATIOS), st.integers(1, 6))
def test_chunks_add_up_and_are_legal(count, ratio, size):
    frames = 1 + ratio * count
    plan = chunk_plan(frames, ratio, ratio * size)
    assert sum(plan) == frames
    assert (plan[0] - 1) % ratio == 0
    assert all(part % ratio == 0 and 0 < part <= ratio * size for part in plan[1:])


@pytest.mark.parametrize("frames", [1, 2, 33, 40])
@torch.no_grad()
def test_any_length_and_size_whole_or_in_chunks(tokenizer, frames):
    torch.manual_seed(0)
    x = torch.rand(1, 3, frames, 19, 16) * 2 - 1
    for ratio in RATIOS:
        whole, parts = reconstruct(tokenizer, x, ratio), reconstruct(tokenizer, x, ratio, chunk=16)
        assert whole.sample.shape == x.shape
        assert whole.padding == parts.padding == Padding(-(frames - 1) % ratio, 5, 0)
        assert (whole.sample - parts.sample).abs().max() < 1e-4
        assert torch.equal(whole.sample, crop_clip(tokenizer(pad_clip(x, ratio)[0], ratio).sample, whole.padding))


@torch.no_grad()
def test_a_streams_result_does_not_depend_on_its_chunks(tokenizer):
    torch.manual_seed(0)
    x = torch.rand(1, 3, 33, 16, 16) * 2 - 1
    for ratio in RATIOS:
        whole = tokenizer(x, ratio).sample
        for plan in ([1, 16, 16], [1, 32], [17, 16], [33]):
            streamed = torch.cat(list(reconstruct_stream(tokenizer, x.split(plan, 2), ratio)), 2)
            assert (streamed - whole).abs().max() < 1e-4


@pytest.mark.parametrize("plan", [(1, 16, 16), (17, 16)])
@torch.no_grad()
def test_chunks_equal_the_whole_where_one_stride_of_time_is_longer_than_its_kernel(plan):
    base = {**TINY, "strides": ((4, 2), (1, 1))}
    check_chunks_equal_the_whole(make_tokenizer(settle=0.05, base=base), plan)


@torch.no_grad()
def test_a_state_of_another_ratio_or_call_is_refused(tokenizer):
    x = torch.zeros(1, 3, 17, 16, 16)
    posterior, encoding = tokenizer.encode_chunk(x, START, 16)
    _, decoding = tokenizer.decode_chunk(posterior.mode(), START, 16)
    z = torch.zeros(1, 4, 2, 2, 2)
    for ratio in (4, 8):
        with pytest.raises(ValueError, match=f"^encode_chunk at {ratio}x: the state is that of encode_chunk at 16x; give the"):
            tokenizer.encode_chunk(x[:, :, 1:], encoding, ratio)
        with pytest.raises(ValueError, match=f"^decode_chunk at {ratio}x: the state is that of decode_chunk at 16x; give the"):
            tokenizer.decode_chunk(z, decoding, ratio)
    with pytest.raises(ValueError, match=r"^decode_chunk at 16x: the state is that of encode_chunk at 16x"):
        tokenizer.decode_chunk(z, encoding, 16)


def held(state):
    """Return the bytes of storage that a state keeps in memory."""
    if isinstance(state, torch.Tensor):
        return {state.untyped_storage().data_ptr(): state.untyped_storage().nbytes()}
    if isinstance(state, PartStates):
        state = state.parts
    values = state.values() if isinstance(state, dict) else state or ()
    return {k: v for value in values for k, v in held(value).items()}


@torch.no_grad()
def test_the_states_memory_does_not_grow_with_the_stream_or_the_chunk(tokenizer):
    def sizes(frames):
        encoding, decoding, kept = START, START, []
        for i in range(4):
            chunk = torch.zeros(1, 3, frames + (i == 0), 16, 16)
            posterior, encoding = tokenizer.encode_chunk(chunk, encoding, 16)
            _, decoding = tokenizer.decode_chunk(posterior.mode(), decoding, 16)
            kept.append(sum(held(encoding).values()) + sum(held(decoding).values()))
        return kept

    short, long = sizes(16), sizes(64)
    assert short[1] == short[2] == short[3] > 0
    assert long[1:] == short[1:]


@torch.no_grad()
def test_encoding_leaves_no_features_to_the_garbage_collector(tokenizer):
    """Reference cycles would keep every feature map until Python's next garbage collection: memory would grow."""
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
        for _ in range(3):
            tokenizer.encode(torch.zeros(1, 3, 17, 16, 16), 16)
            tokenizer.encode_chunk(torch.zeros(1, 3, 17, 16, 16), START, 16)
        assert sum(isinstance(o, torch.Tensor) for o in gc.get_objects()) <= before
    finally:
        gc.enable()


@torch.no_grad()
def test_state_survives_hooks(clip):
    plain, hooked = make_tokenizer(settle=0.05), make_tokenizer(settle=0.05)
    for module in hooked.modules():
        if not list(module.children()):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    results = []
    for model in (plain, hooked):
        state, parts = START, []
        for chunk in clip.split([17, 16], 2):
            posterior, state = model.encode_chunk(chunk, state, 16)
            parts.append(posterior.mode())
        results.append(torch.cat(parts, 2))
    assert torch.equal(*results)
    cast = make_tokenizer(settle=0.05)
    cast.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    streamed = torch.cat(list(reconstruct_stream(cast, clip.split([17, 16], 2), 16)), 2)
    assert (streamed - cast(clip, 16).sample).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_stays_finite_and_close(clip, dtype):
    exact, half = make_tokenizer(settle=0.05), make_tokenizer(settle=0.05).to(dtype)
    for ratio in RATIOS:
        output = half(clip, ratio).sample
        assert output.dtype == dtype
        assert torch.isfinite(output).all()
        reference = exact(clip, ratio).sample
        assert (output.float() - reference).square().mean() < 2e-3 * reference.square().mean()


@torch.no_grad()
def test_encoding_and_decoding_may_differ_in_type(clip):
    model = make_tokenizer(settle=0.05)
    whole = model(clip, 16).sample
    model.set_dtypes(encode=torch.bfloat16, decode=torch.float32)
    posterior = model.encode(clip, 16).latent_dist
    assert posterior.mode().dtype == torch.bfloat16
    output = model.decode(posterior.mode(), 16).sample
    assert output.dtype == torch.float32
    assert (output - whole).square().mean() < 1e-2 * whole.square().mean()


@given(st.integers(1, 500), st.integers(1, 100), st.data())
def test_tiles_cover_every_position(size, tile, data):
    stride = data.draw(st.integers(1, tile))
    covered = {p for start in tile_starts(size, tile, stride) for p in range(start, start + tile)}
    assert set(range(size)) <= covered
    assert all(start + tile <= max(size, tile) for start in tile_starts(size, tile, stride))


def test_tiles_with_gaps_between_them_are_refused():
    with pytest.raises(ValueError, match="tiles of height 256 every 320: the stride must not exceed the tile"):
        Tiling(256, 256, 320, 192)
    with pytest.raises(ValueError, match="tiles of width 128 every 136: the stride must not exceed the tile"):
        Tiling(256, 128, 192, 136)


def test_tiling_of_a_local_function_is_exact_and_blends_at_seams():
    x = torch.rand(1, 1, 2, 80, 104)
    tiling = Tiling(40, 48, 24, 32)

    def tiled(x, function, pixels):
        return in_parts(x, None, lambda part, state: ([function(part)], state), tiling=tiling, pixels=pixels)[0][0]

    def shrink(part):
        return torch.nn.functional.avg_pool3d(part, (1, 8, 8))

    assert torch.allclose(tiled(x, shrink, 1), shrink(x), atol=1e-6)
    z = torch.rand(1, 1, 2, 10, 13)
    grow = torch.nn.Upsample(scale_factor=(1, 8, 8))
    assert torch.allclose(tiled(z, grow, 8), grow(z), atol=1e-6)
    counted = iter(range(100))
    blended = tiled(z[..., :5, :8], lambda part: torch.full_like(grow(part), next(counted)), 8)
    row = blended[0, 0, 0, 0]
    assert row[:8].unique().tolist() == [0]  # the first tile alone, then a line up to the second one
    assert row[-16:].unique().tolist() == [1]
    assert bool((row.diff() >= 0).all() and row.diff().max() < 0.1)


@torch.no_grad()
def test_tiling_is_a_switch(tokenizer):
    x = torch.rand(1, 3, 17, 48, 64) * 2 - 1
    whole = tokenizer(x, 16).sample
    tokenizer.enable_tiling(32, 32, 16, 16)
    tiled = tokenizer(x, 16).sample
    small = tokenizer(x[..., :32, :32], 16).sample
    tokenizer.disable_tiling()
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    assert torch.equal(small, tokenizer(x[..., :32, :32], 16).sample)
    tokenizer.tiling = Tiling()


@pytest.fixture
def tiled():
    """A tokenizer with tiling enabled."""
    model = make_tokenizer(settle=0.05)
    model.enable_tiling(32, 24, 16, 16)
    return model


@contextlib.contextmanager
def widest():
    """Record the height and width, in pixels, of each input of an encoder or decoder."""
    sizes = set()

    def look(module, arguments):
        if isinstance(module, (CrossLevelAttention, ResBlock)):
            sizes.add(tuple(arguments[0].shape[3:]))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
    yield sizes
    handle.remove()


@pytest.mark.parametrize("tile", [(16, 16, 8, 8), (16, 24, 8, 16), (32, 16, 32, 8)])
@pytest.mark.parametrize("ratio", RATIOS)
@torch.no_grad()
def test_a_stream_in_tiles_equals_the_tiled_whole(tile, ratio):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 33, 24, 32) * 2 - 1
    model = make_tokenizer(settle=0.05, base=SHORT)
    untiled = model(x, ratio).sample
    model.enable_tiling(*tile)
    whole = model(x, ratio).sample
    assert (whole - untiled).abs().max() > 1e-3
    for plan in ([1, 16, 16], [17, 16], [1, 32], [33]):
        for model.use_slicing in (False, True):
            streamed = torch.cat(list(reconstruct_stream(model, x.split(plan, 2), ratio)), 2)
            assert (streamed - whole).abs().max() < 1e-4


@torch.no_grad()
def test_every_method_works_in_tiles_and_clip_by_clip(tiled):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 17, 48, 56) * 2 - 1
    z = [tiled.encode(x, ratio).latent_dist for ratio in RATIOS]
    with widest() as sizes:
        together = tiled.encode_levels(x, RATIOS)
        chunk, _ = tiled.encode_chunk(x, START, 16)
        decoded, _ = tiled.decode_chunk(chunk.mode(), START, 16)
        lifted = tiled.lift(chunk.mode(), 16, 4)
    assert {(h, w) for h, w in sizes if h <= 4} >= {(4, 3)}  # features of a tile, a position every 8 pixels
    assert max(h for h, _ in sizes) == 32 // 4  # the widest features have a position every 4 pixels
    assert max(w for _, w in sizes) == 24 // 4
    for a, b in zip([*together, chunk], [*z, z[-1]], strict=True):
        assert torch.equal(a.parameters, b.parameters)
    assert torch.equal(decoded, tiled.decode(z[-1].mode(), 16).sample)
    tiled.enable_slicing()
    assert torch.allclose(tiled.lift(chunk.mode(), 16, 4), lifted, atol=1e-5)
    for a, b in zip(tiled.encode_levels(x, RATIOS), z, strict=True):
        assert torch.allclose(a.parameters, b.parameters, atol=1e-5)
    tiled.disable_tiling()
    tiled.disable_slicing()
    assert (tiled.lift(chunk.mode(), 16, 4) - lifted).abs().max() > 1e-4


@torch.no_grad()
def test_memory_of_a_tiled_stream_does_not_grow_with_its_length(tiled):
    sizes, encoding, decoding = [], START, START
    for i in range(4):
        posterior, encoding = tiled.encode_chunk(torch.zeros(1, 3, 16 + (i == 0), 48, 56), encoding, 16)
        _, decoding = tiled.decode_chunk(posterior.mode(), decoding, 16)
        sizes.append(sum(held(encoding).values()) + sum(held(decoding).values()))
    assert sizes[1] == sizes[2] == sizes[3] > 0


@torch.no_grad()
def test_a_stream_must_keep_its_size_and_its_tiles(tiled):
    x = torch.zeros(1, 3, 17, 48, 56)
    posterior, encoding = tiled.encode_chunk(x, START, 16)
    _, decoding = tiled.decode_chunk(posterior.mode(), START, 16)
    with pytest.raises(ValueError, match=r"chunk of 1 x 48x48 in tiles .*: the state is that of 1 x 48x56 in tiles of 32x24"):
        tiled.encode_chunk(x[:, :, 1:, :, :48], encoding, 16)
    with pytest.raises(ValueError, match=r"chunk of 2 x 6x7 in .*: the state is that of 1 x 6x7 in tiles"):
        tiled.decode_chunk(posterior.mode().repeat(2, 1, 1, 1, 1), decoding, 16)
    tiled.disable_tiling()
    with pytest.raises(ValueError, match=r"chunk of 1 x 48x56 without tiles: the state is that of 1 x 48x56 in tiles"):
        tiled.encode_chunk(x[:, :, 1:], encoding, 16)
    with pytest.raises(ValueError, match="the state is that of a dict"):
        tiled.encode_chunk(x[:, :, 1:], {}, 16)


def test_illegal_sizes_are_named(tokenizer):
    with pytest.raises(ValueError, match="chunk of 24 frames: 16x needs a positive multiple of 16"):
        reconstruct(tokenizer, torch.zeros(1, 3, 33, 16, 16), 16, chunk=24)
    with pytest.raises(ValueError, match="height 20: needs a multiple of 8"):
        tokenizer.enable_tiling(20, 32)
    with pytest.raises(ValueError, match="tiles of width 32 every 40"):
        Tiling(32, 32, 32, 40)
    with pytest.raises(ValueError, match="at least one frame"):
        pad_clip(torch.zeros(1, 3, 0, 8, 8), 4)


ODD = st.one_of(st.integers(-40, 0), st.floats(), st.booleans(), st.text(max_size=3), st.just([16]))


@given(ODD)
@settings(max_examples=40)
def test_odd_ratios_chunks_and_tiles_are_refused_by_name(tokenizer, value):
    x, z = torch.zeros(1, 3, 17, 16, 16), torch.zeros(1, 4, 2, 2, 2)
    ratio_calls = [
        lambda: tokenizer.encode(x, value),
        lambda: tokenizer.encode_levels(x, (4, value)),
        lambda: tokenizer.encode_chunk(x, START, value),
        lambda: tokenizer.decode(z, value),
        lambda: tokenizer.decode_chunk(z, START, value),
        lambda: tokenizer.lift(z, value, 4),
        lambda: tokenizer.lift(z, 16, value),
        lambda: reconstruct(tokenizer, x, value),
        lambda: reconstruct(tokenizer, x, value, chunk=16),
    ]
    named = re.escape(repr(value))
    for call in ratio_calls:
        with pytest.raises(ValueError, match=f"^temporal ratio {named}: this tokenizer has 4x, 8x, 16x"):
            call()
    for call in (lambda: chunk_plan(33, 16, value), lambda: reconstruct(tokenizer, x, 16, chunk=value)):
        with pytest.raises(ValueError, match=rf"^chunk( of)? {named}( frames)?: "):
            call()
    for place in range(4):
        sizes = [16, 16, 16, 16]
        sizes[place] = value
        with pytest.raises(ValueError, match=rf"(height|width) {named}: "):
            tokenizer.enable_tiling(*sizes)
    assert not tokenizer.use_tiling
    assert tokenizer.tiling == Tiling()
    with pytest.raises(ValueError, match=rf"^growth window {named}: "):
        Growth(window=value)
