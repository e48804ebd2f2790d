# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Predictions for TPUs, from the schedules that libtpu compiles."""
