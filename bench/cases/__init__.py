# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What is benchmarked: the heads of models, lengths of sequences, and the calls they make."""
