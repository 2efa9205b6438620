"""Log-mel spectrograms for the mini AudioLDM's VAE and vocoder; 1 ms per clip."""

from nextgpt.mini_world.mini_decoders import MINI_DECODERS, log_mel_of

log_mel = log_mel_of(MINI_DECODERS)  # (N, S) at 16 kHz -> (N, S // hop length, 64)
