"""Decoding against diffusers' VaeImageProcessor."""

import torch
from diffusers.image_processor import VaeImageProcessor


def test_decoding_rounds_as_diffusers_does(pipeline, difference):
    autoencoder = pipeline._parts.autoencoder
    vae = autoencoder._vae
    latents = torch.randn(2, autoencoder.channels, 4, 6)
    with torch.no_grad():
        scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
        decoded = vae.decode(scaled, return_dict=False)[0]
    theirs = VaeImageProcessor().postprocess(decoded)
    ours = autoencoder.decode(latents)
    assert [image.size for image in ours] == [(192, 128)] * 2
    assert max(map(difference, ours, theirs)) == 0


def test_factor_and_channels_come_from_the_config(pipeline):
    assert (pipeline._parts.autoencoder.factor, pipeline._parts.autoencoder.channels) == (32, 4)
