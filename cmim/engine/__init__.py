"""Everything around the training loop: device, evaluation, logging, pictures, the run folder."""
