//! Tables and units, for people.

use crate::output::tame;

/// Prints rows so that columns line up; the first row is the head. Columns in `right` are aligned right. What cells
/// quote cannot steer the terminal.
pub fn table(rows: &[Vec<String>], right: &[usize]) -> String {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| tame(cell, &[])).collect()).collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(column, (cell, width))| match right.contains(&column) {
                true => format!("{cell:>width$}"),
                false => format!("{cell:<width$}"),
            })
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Nanoseconds as milliseconds with two decimals.
pub fn milliseconds(ns: u64) -> String {
    format!("{:.2}", ns as f64 / 1e6)
}

/// Bytes in the largest unit that keeps them above one.
pub fn bytes(count: u64) -> String {
    let mut value = count as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 1000.0 {
            return if unit == "B" { format!("{value} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1000.0;
    }
    format!("{value:.1} TB")
}

/// How long ago a Unix time was, in one unit.
pub fn age(unix_seconds: u64) -> String {
    let seconds = cloche_engine::record::unix_time().saturating_sub(unix_seconds);
    let (count, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86_400 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_lines_up() {
        let rows = [["a", "10"], ["long", "5"]].map(|row| row.map(String::from).to_vec());
        assert_eq!(table(&rows, &[1]), "a     10\nlong   5\n");
    }

    #[test]
    fn table_does_not_pass_on_control_characters() {
        let rows = [vec!["a\u{1b}[2J\u{9b}".to_owned(), "b".to_owned()]];
        assert_eq!(table(&rows, &[]), "a\\u{1b}[2J\\u{9b}  b\n");
    }

    #[test]
    fn bytes_are_rounded_in_their_unit() {
        assert_eq!([0, 999, 1000, 206_000_000].map(bytes), ["0 B", "999 B", "1.0 kB", "206.0 MB"]);
    }
}
