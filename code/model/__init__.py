"""The model and its parts."""

import logging

# Loaded with peft, whether it is used or not: it would warn on every CPU of a kernel that it lacks,
# and of every 8-bit matrix that bf16 is multiplied as fp16.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
