# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""A KV connector of vLLM that finds the first tokens of every prompt elsewhere. Imports vLLM.

It copies nothing: the scheduler's half is all that is run.
"""

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)


class StoredPrefixes(KVConnectorBase_V1):
    """Of request i, 7 * i tokens are stored, which mostly end inside a block.

    `kv_connector_extra_config["loads_async"]` says whether they come while other requests run.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loads_async = self._kv_transfer_config.kv_connector_extra_config["loads_async"]
        self.num_loaded = 0
        self.loading = []

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        stored = min(7 * int(request.request_id), request.num_prompt_tokens - 1)
        found = max(0, stored - num_computed_tokens)
        return found, self.loads_async and found > 0

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        self.num_loaded += num_external_tokens
        if self.loads_async and num_external_tokens:
            self.loading.append(request.request_id)

    def build_connector_meta(self, scheduler_output):
        return KVConnectorMetadata()

    def start_load_kv(self, forward_context, **kwargs):
        raise NotImplementedError("the worker's half")

    wait_for_layer_load = save_kv_layer = wait_for_save = start_load_kv
