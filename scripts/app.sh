#!/usr/bin/env bash
# The demo in the browser.
echo "error: the demo is not part of this version yet; talk to the model with code/inference.py" >&2
exit 1
