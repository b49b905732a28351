"""Operations with gradients and vmap rules of their own: grouped matmul, dispatch of rows, fused ops."""
