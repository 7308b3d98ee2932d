//! Reads memory that has been freed. What finds nothing here finds nothing anywhere.

fn main() {
    let number = Box::into_raw(Box::new(std::env::args().count()));
    // SAFETY: it came from a box.
    drop(unsafe { Box::from_raw(number) });
    // SAFETY: none: reading it now is what this program is for.
    let read = unsafe { number.read_volatile() };
    std::process::exit(i32::from(read == usize::MAX));
}
