# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What the kernels are worth: `python -m bench.NAME`."""
