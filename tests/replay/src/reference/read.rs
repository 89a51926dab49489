//! The reader: what a guest, or somebody who applies a snapshot, would see.
//!
//! Called for images without encryption; compressed clusters are refused, since nothing here decompresses.

use super::{COMPRESSED, COPIED, Header, OFFSET, u64_at};
use crate::image::Image;

/// An image and what is below it.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a> {
    /// The qcow2 file.
    pub image: &'a Image,
    /// Where guest data is, if not there.
    pub data: Option<&'a Image>,
    /// Content of the backing disk.
    pub backing: Option<&'a [u8]>,
}

/// The content of the disk through one L1 table, `size` bytes.
///
/// # Errors
/// A compressed cluster, or an absurd size.
pub fn read_guest(
    chain: &Chain<'_>,
    header: &Header,
    l1_offset: u64,
    l1_size: u32,
    size: u64,
) -> Result<Vec<u8>, String> {
    if size > 1 << 32 {
        return Err(format!("a disk of {size} bytes"));
    }
    let cluster = header.cluster();
    let mut out = vec![0; size as usize];
    if let Some(backing) = chain.backing {
        let n = backing.len().min(out.len());
        out[..n].copy_from_slice(&backing[..n]);
    }
    let file = chain.data.unwrap_or(chain.image);
    for number in 0..size.div_ceil(cluster) {
        let (i, j) = (number / header.l2_entries(), number % header.l2_entries());
        if i >= u64::from(l1_size) {
            return Err(format!("the L1 table ends before cluster {number}"));
        }
        let table = u64_at(chain.image, l1_offset + i * 8) & OFFSET;
        if table == 0 {
            continue;
        }
        let at = table + j * header.l2_entry();
        let word = u64_at(chain.image, at);
        if word & COMPRESSED != 0 {
            return Err(format!("cluster {number} is compressed"));
        }
        let start = (number * cluster) as usize;
        let to = &mut out[start..(start + cluster as usize).min(size as usize)];
        let offset = word & OFFSET;
        let allocated = offset != 0 || (chain.data.is_some() && word & COPIED != 0);
        if header.extended() {
            let bits = u64_at(chain.image, at + 8);
            let sub = (cluster / 32) as usize;
            for (k, part) in to.chunks_mut(sub).enumerate() {
                if bits >> (32 + k) & 1 != 0 {
                    part.fill(0);
                } else if bits >> k & 1 != 0 {
                    file.read(offset + (k * sub) as u64, part);
                }
            }
        } else if header.version > 2 && word & 1 != 0 {
            to.fill(0);
        } else if allocated {
            file.read(offset, to);
        }
    }
    Ok(out)
}
