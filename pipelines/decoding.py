"""How a pipeline turns latents into videos: by its tokenizer, or by a tiny decoder of the same latents."""

import os
from typing import Any, cast

import torch
from torch import Tensor

from promag.tokenizer.geometry import check_ratio
from promag.tokenizer.tiny_decoder import TinyDecoder, load_tiny_decoder

from .inputs import check_decodable, check_parts, check_result, with_defaults


def offload_again(pipe: Any) -> None:
    """Move models that were brought to the device back, where the pipeline offloads them.

    Without offloading nothing is called: it would reset the transformer's cache, in which another thread may denoise.
    """
    if getattr(pipe, "_all_hooks", None):
        pipe.maybe_free_model_hooks()


def device_of_calls(model: Any) -> torch.device:
    """Return the device on which a model computes: the one to which its hooks bring its weights, else that of its weights."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return model.device


class Decoding:
    """Mixin of a pipeline that decodes latents."""

    _decodes_by_tiny = False

    @property
    def model_cpu_offload_seq(self) -> str:
        """The parts in the order of their calls; model offloading brings one to the device and frees the one before it.

        The decoder in use follows the transformer, so that both are never on the device at once.
        """
        decoders = "tiny_decoder->vae" if self._decodes_by_tiny else "vae"
        return f"text_encoder->text_encoder_2->text_encoder_3->transformer->{decoders}"

    def enable_tiny_decoder(self, decoder: TinyDecoder | str | os.PathLike | None = None) -> None:
        """Decode by a tiny decoder from now on: several times faster, and less sharp.

        It decodes in the slices and tiles that are set on `vae`. Model offloading moves it like the other parts; enabled after
        sequential or group offloading, it stays on the device.

        Args:
            decoder: one of `promag train-tiny-decoder`, or its folder, which becomes the pipeline's part `tiny_decoder` and is
                saved with it; None for the part that the pipeline has.

        Raises ValueError for a pipeline without one, and for a decoder of other latents than the tokenizer's; UserError for
        a folder that does not hold one.
        """
        pipe = cast(Any, self)
        part: Any = pipe.tiny_decoder if decoder is None else decoder
        if isinstance(part, str | os.PathLike):
            part = load_tiny_decoder(part)
        if not isinstance(part, TinyDecoder):
            given = "this pipeline was made without one" if part is None else f"{part!r:.100} is none"
            raise ValueError(f"enable_tiny_decoder: {given}; give a TinyDecoder, or its folder")
        if pipe.vae is None:
            raise ValueError("vae: this pipeline was made without one; a tiny decoder decodes its latents")
        part.check_latents_of(pipe.vae)
        part = part.eval().to(pipe.vae.dtype)
        if device_of_calls(part) != (device := device_of_calls(pipe.vae)):
            part.to(device)
        pipe.register_modules(tiny_decoder=part)
        self._decodes_by_tiny = True
        offload_again(pipe)

    def disable_tiny_decoder(self) -> None:
        """Decode by the tokenizer from now on; the part `tiny_decoder` stays."""
        self._decodes_by_tiny = False
        offload_again(self)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, temporal_ratio: int | None = None, output_type: str = "np") -> Any:
        """Decode latents as output_type "latent" returns them.

        Args:
            latents: b c t h w.
            temporal_ratio: temporal ratio of the latents; None for the pipeline's default.
            output_type: "np" and "pt" return videos b T H W C and b T C H W in [0, 1], "pil" lists of pictures.

        Raises ValueError for latents that are not of this tokenizer or not finite, a ratio that it has not, another type, and
        a pipeline without a tokenizer.
        """
        pipe = cast(Any, self)
        check_parts(vae=pipe.vae)
        check_decodable(latents, output_type)
        (ratio,) = with_defaults(pipe.config, temporal_ratio=temporal_ratio)
        check_ratio(ratio, pipe.vae.temporal_ratios)
        videos = self._decode(latents, ratio, output_type)
        offload_again(pipe)
        return videos

    def _decode(self, latents: Tensor, ratio: int, output_type: str) -> Any:
        """Decode latents b c t h w to videos of the wanted type."""
        pipe = cast(Any, self)
        decoder = vae = pipe.vae
        if self._decodes_by_tiny:
            decoder = pipe.tiny_decoder
            decoder.use_slicing, decoder.use_tiling, decoder.tiling = vae.use_slicing, vae.use_tiling, vae.tiling
        latents = latents.to(device_of_calls(decoder), decoder.dtype)
        video = decoder.decode(latents, ratio, return_dict=False)[0]
        check_result(video, "video decoded from finite latents")
        return pipe.video_processor.postprocess_video(video.float(), output_type=output_type)
