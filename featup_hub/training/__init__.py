"""How upsamplers are trained: views, downsamplers, losses, and the loops (extra ``[train]``)."""
