# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Ragged paged attention on Hopper: launch.py launches it, kernel.py has its main loops."""
