# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Writes on TPU: launch.py launches them, kernel.py has their main loop."""
