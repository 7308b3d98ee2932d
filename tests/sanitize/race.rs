//! Two threads write one number without a lock. What finds nothing here finds nothing anywhere.

use std::thread;

static mut NUMBER: u64 = 0;

fn main() {
    let write = |many: u64| {
        // SAFETY: none: the race is what this program is for.
        (0..many).for_each(|at| unsafe { (&raw mut NUMBER).write_volatile(at) });
    };
    thread::scope(|scope| {
        scope.spawn(|| write(1_000));
        scope.spawn(|| write(1_000));
    });
}
