# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""A small serving engine that drives pallas_paged: see engine.Engine."""
