"""Networks: segmenters (encoder, decoder, head) and the decoders that reconstruct pixels class by class."""
