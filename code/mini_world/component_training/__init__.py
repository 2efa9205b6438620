"""Trains the mini world's frozen parts from nothing: encoder, caption towers, decoders."""
