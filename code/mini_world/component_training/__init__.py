"""Train the mini world's frozen components from scratch: encoder, text encoders, decoders."""
