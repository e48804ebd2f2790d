"""draft"""
import jax, jax.numpy as jnp
import pallas_paged as pp
def target(op, tokens, page_size, kv_heads=8, head_dim=128, dtype="bfloat16", form=2):
    from pallas_paged import layout
    pages = max(-(-tokens//page_size)*2, 4)
    S=jax.ShapeDtypeStruct
    pool=S(layout.pool_shape(pages,page_size,kv_heads,head_dim,dtype),dtype)
    k=S((tokens,kv_heads*head_dim),jnp.bfloat16)
    i=jnp.int32
    n=tokens//page_size
    if op=="page": return (lambda p,k,v,a: pp.page_write(p,k,v,a,num_kv_heads=kv_heads,backend="mosaic_tpu")),(pool,k,k,S((n,),i)),{"donate_argnums":0}
    if op=="page_starts": return (lambda p,k,v,a,b: pp.page_write(p,k,v,a,b,num_kv_heads=kv_heads,backend="mosaic_tpu")),(pool,k,k,S((n,),i),S((n,),i)),{"donate_argnums":0}
    if op=="slice": return (lambda p,k,v,a,b: pp.slice_write(p,k,v,a,b,num_kv_heads=kv_heads,backend="mosaic_tpu")),(pool,k,k,S((3,n),i),S((1,),i)),{"donate_argnums":0}
    if op=="token": return (lambda p,k,v,a: pp.token_write(p,k,v,a,num_kv_heads=kv_heads,backend="mosaic_tpu")),(pool,k,k,S((tokens,),i)),{"donate_argnums":0}
