"""The training method: views, masks, pseudo-labels, perturbations and the losses made of them."""
