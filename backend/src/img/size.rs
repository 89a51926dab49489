//! Sizes as people write them, and as qemu-img writes them for people.
//!
//! Pure text; called by every command.

/// Reads a size: decimal with an optional fraction and suffix (`1.5G`), or hexadecimal without either (`0x600`).
///
/// What lies below a byte is cut off (`1.3k` is 1331). `None` for anything else, and for 2^64 and above.
pub fn parse(text: &str) -> Option<u64> {
    let text = text.trim_start();
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        // A sign is no digit.
        return hex.chars().all(|c| c.is_ascii_hexdigit()).then(|| u64::from_str_radix(hex, 16).ok())?;
    }
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (whole, rest) = text.split_at(digits);
    let (fraction, suffix) = match rest.strip_prefix('.') {
        Some(rest) => {
            let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            rest.split_at(digits)
        }
        None => ("", rest),
    };
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let mut letters = suffix.chars();
    let scale = match letters.next() {
        None => 1,
        Some(letter) => multiplier(letter)?,
    };
    if letters.next().is_some() || (!fraction.is_empty() && scale == 1) {
        return None;
    }
    let whole = if whole.is_empty() { 0 } else { whole.parse::<u64>().ok()?.checked_mul(scale)? };
    let mut part: u128 = 0;
    let mut divisor: u128 = 1;
    for digit in fraction.chars().take(18) {
        part = part * 10 + u128::from(digit.to_digit(10)?);
        divisor *= 10;
    }
    whole.checked_add(u64::try_from(part * u128::from(scale) / divisor).ok()?)
}

fn multiplier(letter: char) -> Option<u64> {
    let power = match letter.to_ascii_uppercase() {
        'B' => 0,
        'K' => 1,
        'M' => 2,
        'G' => 3,
        'T' => 4,
        'P' => 5,
        'E' => 6,
        _ => return None,
    };
    Some(1 << (10 * power))
}

/// A size for people, with three significant digits: `216 KiB`, `1.5 GiB`.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    // The unit changes where three digits no longer show the number: at 1000 of a unit, not at 1024.
    let mut unit = 0;
    let mut value = bytes as f64;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}", three_digits(value), UNITS.get(unit).unwrap_or(&""))
}

/// C's `%0.3g` for numbers below 1000.
fn three_digits(value: f64) -> String {
    let digits = match value {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        v if v >= 0.1 => 3,
        _ => 4,
    };
    let text = format!("{value:.digits$}");
    if text == "1000" {
        return "1e+03".to_owned();
    }
    if !text.contains('.') {
        return text;
    }
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests;
