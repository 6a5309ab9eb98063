"""An array as the kernels see it: an address with a shape and byte strides."""

from dataclasses import dataclass

ITEMSIZE = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
    "complex64": 8,
    "complex128": 16,
}


# not frozen: a frozen dataclass takes 1.2 us to make, this one 0.2, and a decode step makes eight
@dataclass(slots=True, eq=False)
class View:
    """An array as the kernels see it; nobody changes one after it is made.

    Attributes
    ----------
    owner : object
        The array itself, so that the memory stays alive; what the user gets back.
    kind : str
        ``"numpy"``, ``"torch"``, ``"cupy"``, ``"numba"`` or ``"dlpack"``.
    device : str
        ``"cpu"``, ``"cuda:0"``, ...
    dtype : str
        ``"float32"``, ``"bfloat16"``, ``"int64"``, ...
    shape : tuple of int
        Sizes of the axes.
    strides : tuple of int
        Byte strides; zero and negative ones occur.
    address : int
        Address of element ``[0, 0, ...]``.
    readonly : bool
        Whether the memory must not be written.
    """

    owner: object
    kind: str
    device: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    address: int
    readonly: bool

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return ITEMSIZE[self.dtype]

    def seen_as(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> "View":
        """Return the same memory with other axes."""
        return View(
            self.owner,
            self.kind,
            self.device,
            self.dtype,
            shape,
            strides,
            self.address,
            self.readonly,
        )

    def swap_last(self) -> "View":
        """Return the same memory with the last two axes swapped."""
        *shape, m, n = self.shape
        *strides, s, t = self.strides
        return self.seen_as((*shape, n, m), (*strides, t, s))

    def is_aligned(self) -> bool:
        """Whether every element is at a multiple of its size."""
        bits = self.address
        for stride in self.strides:
            bits |= stride
        return not bits & (ITEMSIZE[self.dtype] - 1)

    def extent(self) -> tuple[int, int]:
        """Return the offsets from `address` of the first byte and of the byte past the last one.

        Both are 0 for an empty array.
        """
        low = high = 0
        for n, stride in zip(self.shape, self.strides, strict=True):
            if n == 0:
                return 0, 0
            if stride < 0:
                low += (n - 1) * stride
            else:
                high += (n - 1) * stride
        return low, high + self.itemsize

    def overlaps_itself(self) -> bool:
        """Whether two indices may mean the same byte (zero strides, sliding windows)."""
        reach = self.itemsize
        for stride, n in sorted(zip(map(abs, self.strides), self.shape, strict=True)):
            if n == 0:
                return False
            if n > 1:
                if stride < reach:
                    return True
                reach += (n - 1) * stride
        return False
