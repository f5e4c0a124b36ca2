//! Command lines of every subcommand, right and wrong: what is printed and how they end.

mod changing;

use super::assert_same;

#[test]
fn program() {
    assert_same(
        &[],
        &[
            "qemu-img",
            "qemu-img bogus",
            "qemu-img -x",
            "qemu-img -T",
            "qemu-img --trace",
            "qemu-img --",
        ],
    );
}

#[test]
fn info() {
    assert_same(
        &[],
        &[
            "qemu-img --bogus info",
            "qemu-img -T foo info a.raw",
            "qemu-img --trace bogus info a.raw",
            "qemu-img info",
            "qemu-img info -x a.raw",
            "qemu-img info --bogus a.raw",
            "qemu-img info -f",
            "qemu-img info --output",
            "qemu-img info --output=foo a.raw",
            "qemu-img info --out json a.raw",
            "qemu-img info --o json a.raw",
            "qemu-img info a.raw b.raw",
            "qemu-img info --backing-chain=1 a.raw",
            "qemu-img info nothere",
            "qemu-img info -f bogus a.raw",
            "qemu-img info -f file a.raw",
            "qemu-img info --image-opts -f raw a.raw",
            "qemu-img info --image-opts driver=raw,file.filename=a.raw",
            "qemu-img info --image-opts driver=raw",
            "qemu-img info --image-opts driver=bogus,file.filename=a.raw",
            "qemu-img info --image-opts a.raw",
            "qemu-img info --image-opts file.filename=a.raw",
            "qemu-img info --image-opts filename=a.raw",
            "qemu-img info --image-opts filename=a.raw,read-only",
            "qemu-img info --image-opts filename=a.raw,bogus=1",
            "qemu-img info --image-opts filename=a.raw,size=512",
            "qemu-img info --image-opts driver=raw,file.filename=a.raw,size=512",
            "qemu-img info 'json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"a.raw\"}}'",
            "qemu-img info 'json:{\"driver\":\"raw\",\"size\":512,\"file\":{\"driver\":\"file\",\"filename\":\"a.raw\"}}'",
            "qemu-img info 'json:{\"driver\":\"raw\",\"offset\":512,\"file\":{\"driver\":\"file\",\"filename\":\"a.raw\",\"locking\":\"off\"}}'",
            "qemu-img info 'json:{\"file.filename\":\"a.raw\"}'",
            "qemu-img info 'json:{'",
            "qemu-img info 'json:[]'",
            "qemu-img info file:a.raw",
            "qemu-img info bogus:a.raw",
            "qemu-img info ./a.raw",
            "qemu-img info ''",
            "qemu-img info /",
            "qemu-img info /dev/null",
            "qemu-img info -U a.raw",
            "qemu-img info --force-share a.raw",
            "qemu-img info -U --image-opts driver=raw,file.filename=a.raw,force-share=off",
            "qemu-img info -U --image-opts driver=raw,file.filename=a.raw,read-only=off",
            "qemu-img info --object secret,id=sec0,data=foo a.raw",
            "qemu-img info --object bogus,id=sec0,data=foo a.raw",
            "qemu-img info --object secret a.raw",
            "qemu-img info --object secret,id=a a.raw",
            "qemu-img info odd.raw",
            "qemu-img info a.raw -qx",
            "qemu-img info -xq a.raw",
            "qemu-img info -fraw a.raw",
            "qemu-img info -Tx a.raw",
            "qemu-img info -qf",
            "qemu-img info --image-opts=1",
            "qemu-img -- info a.raw",
            "qemu-img info --object",
        ],
    );
}

#[test]
fn map() {
    assert_same(
        &[],
        &[
            "qemu-img map",
            "qemu-img map --output=foo a.raw",
            "qemu-img map a.raw",
            "qemu-img map -s 128k a.raw",
            "qemu-img map --start-offset 70000 --output=json a.raw",
            "qemu-img map --start-offset 2M --output=json a.raw",
            "qemu-img map --max-length 100000 --output=json a.raw",
            "qemu-img map --max-length 5M --output=json a.raw",
            "qemu-img map --max-length x --output=json a.raw",
            "qemu-img map --start-offset x --output=json a.raw",
            "qemu-img map --start-offset -1 --output=json a.raw",
            "qemu-img map --max-length 0 --output=json a.raw",
            "qemu-img map --max-length 0 a.raw",
            "qemu-img map -U a.raw",
            "qemu-img map nope",
            "qemu-img map -f file --output=json a.raw",
            "qemu-img map -f file a.raw",
            "qemu-img map --image-opts driver=raw,file.filename=a.raw,offset=64k,size=128k",
            "qemu-img map --output=json --image-opts driver=raw,file.filename=a.raw,offset=64k,size=128k",
            "qemu-img map --output=json odd.raw",
        ],
    );
}

#[test]
fn measure() {
    assert_same(
        &[],
        &[
            "qemu-img measure",
            "qemu-img measure --size 1k",
            "qemu-img measure --size 1001",
            "qemu-img measure --size x",
            "qemu-img measure --size 1k a.raw",
            "qemu-img measure --size 1k -f raw",
            "qemu-img measure --size 1k -O bogus",
            "qemu-img measure --size 1k -O file",
            "qemu-img measure --size 1k -o help",
            "qemu-img measure --size 1k -o bogus=1",
            "qemu-img measure --size 1k -o preallocation=full",
            "qemu-img measure --size 1k -o preallocation=bogus",
            "qemu-img measure --size 1k -o size=5",
            "qemu-img measure --output=foo a.raw",
            "qemu-img measure --output=json a.raw",
            "qemu-img measure -f raw a.raw b.raw",
            "qemu-img measure -l snap a.raw",
            "qemu-img measure -l snapshot.id=1 a.raw",
            "qemu-img measure -l snapshot.bogus=1 a.raw",
            "qemu-img measure -U a.raw",
            "qemu-img measure --image-opts file.filename=a.raw",
            "qemu-img measure --image-opts --size 1k",
            "qemu-img measure -l x --size 1k",
            "qemu-img measure -U --size 1k",
            "qemu-img measure nope",
        ],
    );
}

#[test]
fn compare() {
    assert_same(
        &[],
        &[
            "qemu-img compare a.raw",
            "qemu-img compare a.raw b.raw b.raw",
            "qemu-img compare a.raw b.raw",
            "qemu-img compare -s a.raw b.raw",
            "qemu-img compare -p a.raw b.raw",
            "qemu-img compare -q a.raw b.raw",
            "qemu-img compare -q -p a.raw a.raw",
            "qemu-img compare a.raw nope",
            "qemu-img compare nope a.raw",
            "qemu-img compare -T bogus a.raw b.raw",
            "qemu-img compare -T none a.raw b.raw",
            "qemu-img compare --image-opts file.filename=a.raw file.filename=b.raw",
            "qemu-img compare --image-opts file.filename=a.raw b.raw",
            "qemu-img compare -x",
            "qemu-img compare -f",
            "qemu-img compare --object bogus a.raw b.raw",
            "qemu-img compare a.raw long.raw",
            "qemu-img compare -s a.raw long.raw",
            "qemu-img compare a.raw longer.raw",
            "qemu-img compare longer.raw a.raw",
            "qemu-img compare odd.raw a.raw",
            "qemu-img compare -qsf raw a.raw a.raw",
            "qemu-img compare a.raw -qs a.raw",
            "qemu-img compare -- a.raw -q",
        ],
    );
}

#[test]
fn resize() {
    assert_same(
        &[],
        &[
            "qemu-img resize",
            "qemu-img resize a.raw",
            "qemu-img resize 1M",
            "qemu-img resize a.raw 2M 3M",
            "qemu-img resize a.raw 2M",
            "qemu-img resize -f raw a.raw 1M",
            "qemu-img resize -f raw --shrink a.raw 1M",
            "qemu-img resize -f raw a.raw +1000",
            "qemu-img resize -f raw a.raw +0",
            "qemu-img resize -f raw a.raw -1000",
            "qemu-img resize -f raw --shrink a.raw -1000",
            "qemu-img resize -f raw --shrink a.raw -1T",
            "qemu-img resize -f raw a.raw +16E",
            "qemu-img resize -f raw a.raw 0",
            "qemu-img resize -f raw a.raw x",
            "qemu-img resize -f raw a.raw +x",
            "qemu-img resize -f raw a.raw +",
            "qemu-img resize -f raw a.raw 7E",
            "qemu-img resize -f raw a.raw 8E",
            "qemu-img resize -f raw --preallocation=full a.raw +1M",
            "qemu-img resize -f raw --preallocation=falloc a.raw +1M",
            "qemu-img resize -f raw --preallocation=metadata a.raw +1M",
            "qemu-img resize -f raw --preallocation=bogus a.raw +1M",
            "qemu-img resize -f raw --shrink --preallocation=full a.raw 1M",
            "qemu-img resize -q -f raw a.raw +1M",
            "qemu-img resize -q a.raw +1M",
            "qemu-img resize -f raw nope +1M",
            "qemu-img resize -f raw --shrink a.raw 0",
            "qemu-img resize -f raw -s a.raw 1M",
            "qemu-img resize --image-opts driver=raw,file.filename=a.raw 2M",
            "qemu-img resize --image-opts driver=raw,size=512,file.filename=a.raw 4M",
        ],
    );
}

#[test]
fn dd() {
    assert_same(
        &[],
        &[
            "qemu-img dd",
            "qemu-img dd if=a.raw",
            "qemu-img dd of=b.raw",
            "qemu-img dd if=a.raw of=b.raw bs=x",
            "qemu-img dd if=a.raw of=b.raw bs=0",
            "qemu-img dd if=a.raw of=b.raw bs=4G",
            "qemu-img dd if=a.raw of=b.raw bs=",
            "qemu-img dd if=a.raw of=b.raw count=x",
            "qemu-img dd if=a.raw of=b.raw skip=x",
            "qemu-img dd if=a.raw of=b.raw bogus=1",
            "qemu-img dd if=a.raw of=b.raw bogus",
            "qemu-img dd if=a.raw of=b.raw",
            "qemu-img dd if=a.raw of=b.raw bs=1000 skip=3 count=5",
            "qemu-img dd if=a.raw of=b.raw bs=1M skip=30 count=5",
            "qemu-img dd -O bogus if=a.raw of=b.raw",
            "qemu-img dd -f raw -O raw if=nope of=b.raw",
            "qemu-img dd if=a.raw of=/nope/b.raw",
            "qemu-img dd -U if=a.raw of=b.raw bs=64k",
            "qemu-img dd --image-opts if=file.filename=a.raw of=b.raw bs=64k",
            "qemu-img dd if=a.raw of=b.raw bs=64k --image-opts",
            "qemu-img dd if=a.raw of=b.raw bs=1M count=1 seek=3",
            "qemu-img dd if=a.raw of=b.raw bs=1M count=-1",
            "qemu-img dd if=a.raw of=b.raw bs=1M count=0",
            "qemu-img dd if=a.raw of=a.raw",
        ],
    );
}

#[test]
fn bench() {
    assert_same(
        &[],
        &[
            "qemu-img bench",
            "qemu-img bench -c x a.raw",
            "qemu-img bench -c 0 a.raw",
            "qemu-img bench -d x a.raw",
            "qemu-img bench -s 0 a.raw",
            "qemu-img bench -s x a.raw",
            "qemu-img bench -S x a.raw",
            "qemu-img bench -S -1 a.raw",
            "qemu-img bench -o x a.raw",
            "qemu-img bench -o -1 a.raw",
            "qemu-img bench -o 5G a.raw",
            "qemu-img bench -t bogus a.raw",
            "qemu-img bench -i bogus a.raw",
            "qemu-img bench -i native a.raw",
            "qemu-img bench -n a.raw",
            "qemu-img bench -n -t none -c 10 a.raw",
            "qemu-img bench --pattern x a.raw",
            "qemu-img bench --pattern 256 a.raw",
            "qemu-img bench --flush-interval x a.raw",
            "qemu-img bench --flush-interval 5 a.raw",
            "qemu-img bench --flush-interval 5 -w -c 10 a.raw",
            "qemu-img bench --flush-interval 5 -w -c 10 -f raw a.raw",
            "qemu-img bench --flush-interval 5 -d 6 -w -c 10 -f raw a.raw",
            "qemu-img bench --flush-interval 5 -d 6 --no-drain -w -c 10 -f raw a.raw",
            "qemu-img bench --flush-interval 64 -w -c 10 -f raw a.raw",
            "qemu-img bench --no-drain -w -c 10 -f raw a.raw",
            "qemu-img bench -q -c 10 -f raw a.raw",
            "qemu-img bench -c 10 -S 512 -s 1k -o 1000 -f raw a.raw",
            "qemu-img bench -c 1000 -s 1M -f raw a.raw",
            "qemu-img bench -c 10 -U -f raw a.raw",
            "qemu-img bench -c 10 -U -w -f raw a.raw",
            "qemu-img bench -c 10 -w --pattern 0xff -f raw a.raw",
            "qemu-img bench -c 10 --image-opts driver=raw,file.filename=a.raw",
            "qemu-img bench -c 1 -s 100G -f raw a.raw",
        ],
    );
}
