"""The training method: views, masks, pseudo-labels, perturbations and losses."""
