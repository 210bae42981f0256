"""What the process of a trial imports, in one go: the first processes of a local Ray do that as they start, while the
driver still looks at the data, and not when a trial waits for it. Later ones may be for something else.
"""

import gc
import importlib
import os
import time

UNTIL = "SEGDEC_TUNER_WARM_UNTIL"
"""the environment variable that says up to when, in seconds since the epoch"""

if time.time() < float(os.environ.get(UNTIL, "0")):
    gc.disable()  # what is imported stays: to look through it over and over takes longer
    for _name in ("torch._dynamo", "tuner.search", "tuner.plan", "tuner.timing"):  # the first with the first optimizer
        importlib.import_module(_name)
    gc.enable()
    gc.freeze()
