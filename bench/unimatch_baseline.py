"""UniMatch's step as the field writes it: float32, contiguous tensors, eager, logits at full resolution.

The method is that of the `unimatch` preset, on the same network, so that both have the same loss: weak views share their
pass with the labelled images, pseudo-labels come from it, and boxes of CutMix from the partner in the batch. After each
step the losses go to the meters, for which the host waits.
"""

import torch
import torch.nn.functional as F

IGNORED = 255


class UsualLoop:
    def __init__(self, net, optimizer, *, tau, dropout):
        """`dropout`: a function of a list of feature maps of unlabelled images."""
        self.net, self.optimizer, self.tau, self.dropout = net, optimizer, tau, dropout
        self.criterion = torch.nn.CrossEntropyLoss(ignore_index=IGNORED)
        self.meters = dict.fromkeys(("loss", "labelled", "strong", "dropout", "mask"), 0.0)

    def step(self, batch):
        loss = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def loss(self, batch):
        """batch: images as normalised float32, labels (L, H, W) int64 with 255 for ignored, `valid`, `box`."""
        net, size = self.net, batch["labelled"].shape[-2:]
        net.train()
        x, u_w = batch["labelled"], batch["weak"]
        maps = net.encode(torch.cat([x, u_w]))
        dropped = self.dropout([m[len(x) :] for m in maps])
        logits = net.classify(net.decode([torch.cat(pair) for pair in zip(maps, dropped, strict=True)]))
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=net.align_corners)
        logits_x, logits_w, logits_dropped = logits.split([len(x), len(u_w), len(u_w)])

        confidence, label = logits_w.detach().softmax(dim=1).max(dim=1)
        views = []
        for image, boxes in zip(batch["strong"], batch["box"], strict=True):
            parts = [image.clone(), label.clone(), confidence.clone(), batch["valid"].clone()]
            for i, (top, left, bottom, right) in enumerate(boxes.tolist()):
                box = (slice(top, bottom), slice(left, right))
                for part, source in zip(parts, (image, label, confidence, batch["valid"]), strict=True):
                    part[i][(..., *box)] = source[i ^ 1][(..., *box)]
            views.append(parts)
        logits_s = net.classify(net.decode(net.encode(torch.cat([view[0] for view in views]))))
        logits_s = F.interpolate(logits_s, size, mode="bilinear", align_corners=net.align_corners).chunk(2)

        labelled = self.criterion(logits_x, batch["label"])
        strong = [self.consistency(logits, *parts[1:]) for logits, parts in zip(logits_s, views, strict=True)]
        dropout = self.consistency(logits_dropped, label, confidence, batch["valid"])
        loss = (labelled + strong[0] * 0.25 + strong[1] * 0.25 + dropout * 0.5) / 2
        self.meters["loss"] += loss.item()
        self.meters["labelled"] += labelled.item()
        self.meters["strong"] += (strong[0] + strong[1]).item() / 2
        self.meters["dropout"] += dropout.item()
        self.meters["mask"] += ((confidence >= self.tau) & batch["valid"]).sum().item() / batch["valid"].sum().item()
        return loss

    def consistency(self, logits, label, confidence, valid):
        target = torch.where(valid, label, IGNORED)
        error = F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="none")
        return (error * ((confidence >= self.tau) & valid)).sum() / valid.sum().item()
