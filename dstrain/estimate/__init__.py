"""What a training needs, before it runs: memory of a rank, bytes on the network, time of a step, and a layout that fits.

Formulas over configurations: no tensor is made. Only the number of parameters comes from the model itself, built on the meta
device. Tests hold parameters and states to those of engines, activations to what autograd keeps, FLOPs to torch's counter, bytes
to DeepSpeed's log, and the whole to the peak of real trainings.
"""
