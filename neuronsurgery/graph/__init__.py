"""A model's forward as a checked graph: captured once, replayed for many edits.

`export.capture` turns the forward (with `predict` inside, so that only logits leave) into a `replay.Graph` of torch
operators, none of which writes into another one's value (`writes`). An edit taints the nodes that its parameters reach;
everything else has the value of the unedited run. `schedules.Schedule` runs the graph once without edits and, as soon
as everything that an edit's tainted nodes read is there, runs just those; but not a layer of which the edit zeroes
channels, which `fills` fills, and of several edits in small batches as one (`stacks`).

A graph records one path through the model's Python and checks no guards, so it may be wrong for other inputs than those
it was captured with. `trust.CheckedForward` replays it only where it was checked. `operators` names what the nodes do,
and `residual` finds the residual branches.
"""
