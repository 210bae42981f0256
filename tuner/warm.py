"""What the process of a trial imports, in one go: some processes do that as they start, while the driver still looks at
the data, and not when a trial waits for it.
"""

import gc

gc.disable()  # what is imported stays: to look through it over and over takes a quarter longer

import torch._dynamo  # noqa: E402, F401  (torch imports it when the first optimizer is made)

import tuner.plan  # noqa: E402
import tuner.search  # noqa: E402
import tuner.timing  # noqa: E402, F401

gc.enable()
gc.freeze()
