"""Decoding against diffusers' VaeImageProcessor."""

import torch
from diffusers.image_processor import VaeImageProcessor

from redux_pipelines import autoencoder as module
from redux_pipelines.autoencoder import Autoencoder


def theirs(vae, latents):
    with torch.no_grad():
        scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
        decoded = vae.decode(scaled, return_dict=False)[0]
    return VaeImageProcessor().postprocess(decoded)


def test_decoding_rounds_as_diffusers_does(pipeline, difference):
    autoencoder = pipeline._parts.autoencoder
    latents = torch.randn(2, autoencoder.channels, 4, 6)
    ours = autoencoder.decode(latents)
    assert [image.size for image in ours] == [(192, 128)] * 2
    wanted = theirs(autoencoder._vae, latents)
    assert max(map(difference, ours, wanted)) <= 1
    assert ours[0].tobytes() == autoencoder.decode(latents[:1])[0].tobytes()


def test_pictures_above_a_size_are_decoded_in_strips(pipeline, difference, monkeypatch):
    vae = pipeline._parts.autoencoder._vae
    latents = torch.randn(1, 4, 4, 6)  # 192 × 128 pixels
    asked = []
    decode = module.Decoder.__call__

    def spy(self, latents, strips):
        asked.append(strips)
        return decode(self, latents, strips)

    monkeypatch.setattr(module.Decoder, "__call__", spy)
    monkeypatch.setattr(module, "STRIP_PIXELS", 192 * 40)
    (whole,) = Autoencoder(vae, tile_above_pixels=192 * 128).decode(latents)
    (cut,) = Autoencoder(vae, tile_above_pixels=192 * 128 - 1).decode(latents)
    assert asked == [1, 4]
    assert difference(whole, cut) <= 1
    assert difference(cut, *theirs(vae, latents)) <= 1


def test_factor_and_channels_come_from_the_config(pipeline):
    assert (pipeline._parts.autoencoder.factor, pipeline._parts.autoencoder.channels) == (32, 4)
