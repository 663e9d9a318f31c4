"""Operations with one eager definition each (`reference.py`) and faster kernels beside it."""
