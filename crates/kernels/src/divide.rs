//! Division by a number that is known beforehand, as a multiplication and a shift.

/// Numbers that are divided, and divisors, are below this.
pub(crate) const LIMIT: u32 = 1 << 31;

/// `n / divisor == n * factor >> shift` for every `n` below [`LIMIT`].
///
/// `shift` is `31 + k` for `2^(k - 1) < divisor <= 2^k`, and `factor` is `2^shift / divisor` rounded up, which is
/// `(2^shift + e) / divisor` with `e < divisor`. So `n * factor / 2^shift` is `n / divisor` and
/// `n * e / (divisor * 2^shift)` more, which is less than `1 / divisor` as `n * e < 2^31 * 2^k`: too little to reach the
/// next whole number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Divisor {
    pub(crate) factor: u32,
    pub(crate) shift: u32,
}

impl Divisor {
    /// For a divisor from 1 to [`LIMIT`].
    pub(crate) fn new(divisor: u32) -> Self {
        debug_assert!((1..=LIMIT).contains(&divisor));
        let shift = 31 + (u32::BITS - (divisor - 1).leading_zeros());
        let factor = (1_u64 << shift).div_ceil(u64::from(divisor));
        // Below 2^32: `divisor` is more than 2^(k - 1) by at least one.
        Self { factor: u32::try_from(factor).unwrap_or(u32::MAX), shift }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotients_are_exact_where_they_change() {
        let mut divisors: Vec<u32> = (1..5000).collect();
        for power in 12..31 {
            divisors.extend([(1 << power) - 1, 1 << power, (1 << power) + 1]);
        }
        divisors.extend((0..1_u32 << 12).map(|n| n.wrapping_mul(0x9e37_79b9) % (LIMIT - 1) + 1));
        divisors.extend([LIMIT - 1, LIMIT]);
        for divisor in divisors {
            let Divisor { factor, shift } = Divisor::new(divisor);
            let last = (LIMIT - 1) / divisor;
            for quotient in [0, 1, 2, 3, last / 2, last.saturating_sub(1), last] {
                let multiple = u64::from(quotient) * u64::from(divisor);
                for number in [multiple.saturating_sub(1), multiple, multiple + 1] {
                    if number < u64::from(LIMIT) {
                        let got = (number * u64::from(factor)) >> shift;
                        assert_eq!(got, number / u64::from(divisor), "{number} / {divisor}");
                    }
                }
            }
        }
    }
}
